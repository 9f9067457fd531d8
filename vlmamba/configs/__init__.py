"""What `VLMambaConfig` is made of: shapes of language models and encoders, presets, checks."""
