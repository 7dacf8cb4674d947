"""The groundwork of deep networks: a leaf package that knows only torch."""

from regraft.nn.folding import fold_batchnorm

__all__ = ["fold_batchnorm"]
