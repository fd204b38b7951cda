"""Everything that touches ComfyUI's inside: inputs, sampling, model access, masks, wrappers, plots."""
