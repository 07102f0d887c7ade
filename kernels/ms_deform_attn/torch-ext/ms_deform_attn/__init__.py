from ._ops import ops
__all__ = []
