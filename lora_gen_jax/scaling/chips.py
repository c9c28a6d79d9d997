"""Published figures of TPU chips, per chip.

Source: Google Cloud's TPU documentation, the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" at
https://cloud.google.com/tpu/docs (their tables of key specifications). Where editions differ, the lower figure stands
here: v6e's HBM bandwidth (1600 or 1640 GB/s) and interconnect (3200 or 3584 Gbit/s).

Which part of the interconnect's figure one direction gets, the pages do not say plainly. Earlier editions give one
number in Gbit/s (v5e: 1600), later ones twice as many bytes and call them bidirectional (v5e: 400 GB/s, hence 200 GB/s
each way). Half of the EARLIER number is what a chip is taken to receive here (v5e: 100 GB/s). It is a rate over all
links: on a slice without wrap-around a corner chip reaches it at best, and along an axis that lies on one line an end
chip has half of it.

The network between slices: 6.4 Tbit/s for a pod of 256 (v5e), 25.6 Tbit/s for 256 (v6e), 50 Gbit/s a chip (v5p). The
page of v4 gives none; the least of the others is taken.
"""

import dataclasses

GIGABIT = 1e9 / 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do.

    Attributes:
        name: as in a topology's name.
        flops: bf16 flops a second; a multiply-add is two.
        hbm: bytes of HBM.
        hbm_rate: bytes a second between HBM and core.
        ici: bytes a second of the interconnect, all links together, as the earlier editions give it.
        dcn: bytes a second that a chip receives from other slices.
    """

    name: str
    flops: float
    hbm: float
    hbm_rate: float
    ici: float
    dcn: float

    @property
    def receive_rate(self) -> float:
        """Bytes a second that a chip is taken to receive over the interconnect."""
        return self.ici / 2


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32e9, 1228e9, 2400 * GIGABIT, 25 * GIGABIT),
        Chip("v5e", 197e12, 16e9, 819e9, 1600 * GIGABIT, 25 * GIGABIT),
        Chip("v5p", 459e12, 95e9, 2765e9, 4800 * GIGABIT, 50 * GIGABIT),
        Chip("v6e", 918e12, 32e9, 1600e9, 3200 * GIGABIT, 100 * GIGABIT),
    )
}
