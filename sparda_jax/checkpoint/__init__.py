"""Reading and writing models: GGUF, safetensors, Forecast weights, tokenizers.

Whatever comes out of a file is checked before it is believed; every refusal is a
`CheckpointError` that says which file, which field, what was found and what would be
allowed.
"""
