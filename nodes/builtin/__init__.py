"""The models that come with the pack, and the VAE of their pixels."""
