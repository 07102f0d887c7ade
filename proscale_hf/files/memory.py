"""How to tell that memory did not suffice: each library says so in its own way."""

import errno
import re


OUT_OF_MEMORY = re.compile(r"not enough memory|can(no|')t allocate memory|out of memory|bad_alloc|ALLOC_FAILED", re.I)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of Python, the system, numpy, PyTorch or a GPU's library, means that memory did not suffice."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which is not imported
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
