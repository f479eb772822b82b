"""The networks, as ``nn.Module`` under their published (diffusers, transformers) key names.

No files and no schedule here: tensors in, tensors out.
"""
