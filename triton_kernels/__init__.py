"""moe_offload's Triton kernels, imported as `moe_offload.triton_kernels` and under no other name.

The folder stands at the top level of the source tree for readers; `setup.py` maps it into the
package. OpenAI's package `triton_kernels` owns the top-level name, and vLLM and SGLang probe for
it: if Python, started in this source tree, offered our folder under that name, they would take it
for OpenAI's. The wrong name raises ImportError, which such probes read as "not installed".
"""

if __name__ != "moe_offload.triton_kernels":
    raise ImportError(
        f"{__name__!r} was found in moe_offload's source tree ({__file__}); that folder is not "
        "OpenAI's triton_kernels package. For moe_offload's kernels, "
        "`import moe_offload.triton_kernels` (after `pip install -e .`); for OpenAI's package, "
        "install it and start Python in another folder."
    )
