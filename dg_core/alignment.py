"""Score alignment: does scaling the starting noise change the final log-density, and by how much?

Along the probability-flow ODE a small change of the start becomes the tangent v with dv/ds = J v. Pushing the prior's
score v_T = grad log p_T through it gives (arXiv 2502.05807, section on prior guidance)

    SA = < grad log p_0(y_0), v_0 >,

and where SA > 0, less noise at the start means a higher log-density at the end. Everything here is in the
variance-preserving state u = x / sqrt(alpha^2 + sigma^2) with theta = atan(s), finite also where alpha = 0, and
normalised so that the tangent is the change of u per unit of ln(1 / noise scale) (derived here; y = u / cos(theta)):

symbol      name            meaning
w           tangent         w_T = -n for the starting noise n; w = s_T^2 cos(theta) v
n'          -               score of u, grad log p_u = -eps / sin(theta)
A           alignment       <grad log p_u, w> = s_T^2 SA, in nats per unit of ln(1 / scale)
cosine      cosine          A / (|grad log p_u| |w|), the same in every coordinates
q           curvature       <p, D^2 denoised(x)[tangent of x, scale p]> for a Rademacher probe p

With the score, (u, w) is integrated and A read at the end. Without it, the product rule gives

    dA/dtheta = (1 / sin(theta)) E[q],

so A needs the score at the start alone, where it is the prior's (derived here from d/ds <grad log p, v> =
-<grad div eps, v>; the identity part of div eps does not depend on y and drops out).
"""
