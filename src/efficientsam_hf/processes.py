# SPDX-License-Identifier: Apache-2.0
"""Work shared between the processes of `accelerate launch` or torchrun; a process that is alone has all of it.

Between `own_share` and `collect` the processes do not wait for each other.
"""

from typing import TypeVar

import torch.distributed as dist


Part = TypeVar("Part")


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Whether this process is the one that shows and writes results."""
    return not _several() or dist.get_rank() == 0


def own_share(count: int) -> range:
    """Numbers, of 0 to `count` - 1, that fall to this process: of pictures, of shards."""
    return range(dist.get_rank(), count, dist.get_world_size()) if _several() else range(count)


def collect(parts: list[Part]) -> list[Part]:
    """What all processes have, in each of them, by rank; every process must come here."""
    if not _several():
        return parts
    lists: list[list[Part]] = [[]] * dist.get_world_size()
    dist.all_gather_object(lists, parts)
    return [part for one in lists for part in one]
