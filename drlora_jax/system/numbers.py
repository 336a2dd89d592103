"""Integer arithmetic."""


def ceil_div(number: int, divisor: int) -> int:
    """Returns the quotient, rounded up."""
    return -(-number // divisor)
