"""What has to be known of the kernels that torch.compile makes."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernels_leave_waits_out() -> bool:
    """Whether the kernels of the graph that is being traced may start early, and read before they
    wait.

    With ``triton.enable_pdl`` they do so where they read nothing of the kernel before, and take it
    that those before that one have ended. But a product that fetches its weights early lets the
    next kernel start before it has waited itself, so it must not fetch them then.
    """
    from torch._inductor import config

    return bool(getattr(getattr(config, "triton", None), "enable_pdl", False))
