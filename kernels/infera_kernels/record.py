"""Records in files that the first model imports: a class of this kind is made in no time."""

from __future__ import annotations

from typing import Any, dataclass_transform


@dataclass_transform(frozen_default=True)
class Record:
    """Has the fields that its class declares, given in order or by name; a class attribute is a default.

    NamedTuple and dataclass write each class its methods and compile them, which takes up to half a millisecond; such a
    record takes longer to make, and compares by identity.
    """

    def __init__(self, *values: Any, **named: Any) -> None:
        self.__dict__.update(zip(type(self).__annotations__, values, strict=False), **named)
