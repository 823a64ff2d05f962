"""What parameters of operations on block devices may be, and what is said of those that may not."""

import uuid as uuids

from reactor.errors import OperationError

EINVAL = -22
BLOCK_SIZES = (512, 4096)
MAX_SIZE = 1 << 62  # bytes; offsets are signed to the kernel
MAX_NAME = 255


def check_name(name: str) -> str:
    """Return ``name``; OperationError(-22) if it cannot be one."""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise OperationError(
            EINVAL, f"name {name[:40]!r}: must have 1 to {MAX_NAME} printable characters"
        )
    return name


def check_uuid(uuid: str) -> str:
    """Return ``uuid`` in its usual form, or "" for none; OperationError(-22) if it is not one."""
    if not uuid:
        return ""
    try:
        return str(uuids.UUID(uuid))
    except ValueError:
        raise OperationError(
            EINVAL, f"uuid {uuid!r:.60}: not of the form xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"
        ) from None


def check_block_size(block_size: int) -> int:
    """Return ``block_size``; OperationError(-22) if it is not one that is served."""
    if block_size not in BLOCK_SIZES:
        raise OperationError(EINVAL, f"block_size {block_size}: must be 512 or 4096")
    return block_size


def check_num_blocks(num_blocks: int, block_size: int) -> int:
    """Return ``num_blocks``; OperationError(-22) if it is not positive, or too large."""
    if num_blocks < 1:
        raise OperationError(EINVAL, f"num_blocks {num_blocks}: must be 1 or more")
    if num_blocks > MAX_SIZE // block_size:
        raise OperationError(
            EINVAL, f"num_blocks {num_blocks}: must be {MAX_SIZE // block_size} or fewer"
        )
    return num_blocks


def blocks_of(size_mb: int, block_size: int) -> int:
    """Return how many blocks ``size_mb`` MiB are; OperationError(-22) if not a possible size."""
    if not 1 <= size_mb <= MAX_SIZE >> 20:
        raise OperationError(EINVAL, f"new_size {size_mb}: must be 1 to {MAX_SIZE >> 20} MiB")
    return (size_mb << 20) // block_size


def check_physical_block_size(physical_block_size: int, block_size: int) -> int:
    """Return it, or ``block_size`` for 0; OperationError(-22) if not a power of two above that."""
    size = physical_block_size or block_size
    if size < block_size or size & (size - 1):
        raise OperationError(
            EINVAL,
            f"physical_block_size {size}: must be a power of two, block_size {block_size} or more",
        )
    return size


def refuse_unsupported(**parameters: int | bool | None) -> None:
    """Raise OperationError(-22) for the first parameter that is neither absent nor 0."""
    for name, value in parameters.items():
        if value:
            raise OperationError(EINVAL, f"{name} {value}: not supported; leave it out, or 0")
