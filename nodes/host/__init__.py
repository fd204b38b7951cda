"""The wing that touches ComfyUI's inside: sampling, model access, masks, hooks, progress, versions."""
