"""Every error that regraft raises on purpose: one sentence that a user can act on.

    RegraftError
    |-- PictureError    a file or an array is not a picture that can be read faithfully
    |-- DataError       a data set, a table of labels or a split cannot be used
    |-- BackboneError   a network or its weights cannot be had or cannot be used
    |-- TraceError      a network cannot be followed from input to output
    |-- CutError        a cut does not exist, or lies where the network does not fall in two
    |-- StoreError      the feature store cannot be read or written
    |-- TrainingError   a training cannot go on
    |-- ArtifactError   a saved model is incomplete, damaged or from somewhere else
    `-- RunError        a run directory belongs to another run

The sentence says what must hold, what was found where, and what to try. The command line prints it and
exits with 1; Python users catch RegraftError.
"""

from __future__ import annotations


class RegraftError(Exception):
    """The parent of all errors that the user of regraft can mend."""


class PictureError(RegraftError):
    """A file or an array is not a picture that can be read faithfully."""


class DataError(RegraftError):
    """A data set, its labels or a split of it cannot be used."""


class BackboneError(RegraftError):
    """A network or its weights cannot be had or cannot be used."""


class ReaderError(BackboneError):
    """A file of weights is not what it must be, or holds nothing of what was asked for."""


class TraceError(RegraftError):
    """A network cannot be followed from its input to its output."""


class CutError(RegraftError):
    """A cut does not exist, or lies where the network does not fall in two."""


class StoreError(RegraftError):
    """The feature store cannot be read or written."""


class TrainingError(RegraftError):
    """A training cannot go on: its loss is not a number, or no setting is left."""


class ArtifactError(RegraftError):
    """A saved model is incomplete, damaged or belongs to another architecture."""


class RunError(RegraftError):
    """A run directory holds another run than the one asked for."""


def first_line(error: BaseException, *, kind: bool = False) -> str:
    """What an error of a library says, as a clause without the traces below it; its type where it says nothing.

    kind: the type goes before what it says.
    """
    words = str(error).strip().partition("\n")[0].rstrip(". ")
    name = type(error).__name__
    return f"{name}: {words}" if kind and words else words or name
