"""What the network is told beside the noisy latents: tokens, a vector, extra planes.

Variations, unCLIP, depth and inpainting are entries here that write to named slots, not
pipelines of their own.
"""

from safelight.conditioning.slots import Conditioning, pad_tokens
from safelight.conditioning.text import Script, encode_prompts, script

__all__ = ["Conditioning", "Script", "encode_prompts", "pad_tokens", "script"]
