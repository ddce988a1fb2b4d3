"""Images that will not decode: how they are reported, counted and, past a limit, refused."""

from __future__ import annotations

import warnings

import torch

__all__ = ["Damage", "DamagedDataError", "DamagedImageWarning"]


class DamagedImageWarning(UserWarning):
    """An image could not be decoded, and another one stands in for it or it is left out."""


class DamagedDataError(RuntimeError):
    """More images are damaged than the run was told to put up with."""


class Damage:
    """The damaged images of a source: one flag each, in memory that all workers share.

    Flags and not a counter, so that an image that two workers meet counts once.

    Example:
        >>> damage = Damage(images=10, limit=1)
        >>> damage.record(3, "pets/cat/3.jpg", "cut short", stacklevel=1)  # doctest: +SKIP
        DamagedImageWarning: Damaged image: pets/cat/3.jpg (cut short). Another one stands in ...
        >>> damage.is_known(3), damage.count  # doctest: +SKIP
        (True, 1)

    Args:
        images: how many there are.
        limit: how many damaged ones to put up with.
    """

    def __init__(self, images: int, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"max_damaged must be 0 or more, not {limit}.")
        self._flags = torch.zeros(images, dtype=torch.bool)
        self._flags.share_memory_()  # type: ignore[no-untyped-call, unused-ignore]
        self.limit = limit

    @property
    def count(self) -> int:
        """Count the damaged images met so far."""
        return int(self._flags.sum())

    def is_known(self, row: int) -> bool:
        """Tell whether an image has been found damaged."""
        return bool(self._flags[row])

    def record(
        self,
        row: int,
        place: str,
        reason: str,
        *,
        outcome: str = "Another one stands in for it",
        stacklevel: int = 4,
    ) -> None:
        """Note a damaged image and warn of it.

        Args:
            row: the image.
            place: where it lies, for people.
            reason: why it cannot be decoded.
            outcome: what became of it.
            stacklevel: of the warning; 4 is where a data set was indexed.

        Raises:
            DamagedDataError: this is one more than the limit.
        """
        self._flags[row] = True
        count = self.count
        if count > self.limit:
            raise DamagedDataError(
                f"{count} images are damaged, more than max_damaged={self.limit}; the last is "
                f"{place} ({reason}). The warnings above name the others. Get them again, or raise "
                "max_damaged if you can do without them."
            )
        so_far = f"{count} of at most {self.limit} so far"
        warnings.warn(
            f"Damaged image: {place} ({reason}). {outcome}; {so_far}.",
            DamagedImageWarning,
            stacklevel=stacklevel,
        )
