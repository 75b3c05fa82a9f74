"""The product of few rows and a matrix, read as words, equals the plain product.

The compiled loop is tested in test_compiled.py.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from minimas.fast.few_rows import product


@given(
    st.integers(1, 9), st.integers(1, 18), st.integers(1, 4), st.integers(0, 99)
)  # fmt: skip
def test_the_product_of_rows_and_a_matrix_read_as_words_is_exact(
    N: int, pairs: int, R: int, seed: int
) -> None:
    """It must be right for signs, both halves of a word and an odd number of outputs.

    Products of integers have no rounding that could hide a bug.
    """
    torch.manual_seed(seed)
    K = 2 * pairs
    weight = torch.randint(-128, 128, (N, K)).bfloat16()
    x = torch.randint(-9, 10, (R, K)).to(torch.bfloat16)
    found = product(x, weight)
    assert torch.equal(found.double(), x.double() @ weight.double().T)
    assert found.is_contiguous(), (
        "another layout than a plain layer's: the layers behind it compile anew"
    )
    if bool((weight[0] != weight[0].flip(0)).any()) and len(set(x[0].tolist())) == K:
        assert not torch.equal(found, product(x.flip(-1), weight)), "inputs in any order"
