"""The helpers let good results through and catch zero, biased, sparse and non-finite errors."""

import pytest
import torch
from helpers import assert_as_accurate, assert_no_zero_block, assert_same_direction, golden, on_threads


@pytest.fixture
def exact():
    return torch.randn(10, 100, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_correctly_rounded_result_passes_against_any_eager(exact, dtype):
    assert_as_accurate(exact.to(dtype), exact.to(dtype), exact)
    assert_as_accurate(exact.to(dtype), (exact * 1.01).to(dtype), exact)


def test_as_inaccurate_as_eager_passes(exact):
    noise = 1e-4 * torch.randn_like(exact)
    assert_as_accurate((exact + noise).float(), (exact - noise).float(), exact)


def test_three_times_the_error_of_eager_is_caught(exact):
    noise = 1e-4 * torch.randn_like(exact)
    with pytest.raises(AssertionError, match="largest error"):
        assert_as_accurate((exact + 3 * noise).float(), (exact + noise).float(), exact)


def test_a_bias_below_the_largest_error_is_caught(exact):
    eager = exact.float()
    eager[0, 0] += 1e-3
    with pytest.raises(AssertionError, match="mean square error"):
        assert_as_accurate((exact + 1e-3).float(), eager, exact)


def test_a_sparse_error_is_caught(exact):
    wrong = exact.float()
    wrong[3, 7] += 1e-3
    with pytest.raises(AssertionError, match="largest error"):
        assert_as_accurate(wrong, exact.float(), exact)


def test_shape_and_finiteness_are_checked(exact):
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(exact[:1], exact, exact)
    wrong = exact.clone()
    wrong[0, 0] = torch.nan
    with pytest.raises(AssertionError, match="1 elements are not finite"):
        assert_as_accurate(wrong, exact, exact)


def test_a_small_block_left_at_zero_is_caught(exact):
    exact[5] *= 1e-9
    wrong = exact.clone()
    wrong[5] = 0
    assert_same_direction(wrong, exact)
    with pytest.raises(AssertionError, match="are zero and should not be"):
        assert_no_zero_block(wrong, exact)


def test_a_block_that_underflows_may_be_zero():
    assert_no_zero_block(torch.zeros(100).half(), torch.full((100,), 1e-12, dtype=torch.float64))


def test_another_direction_is_caught(exact):
    with pytest.raises(AssertionError, match="cosine"):
        assert_same_direction(exact + 0.01 * torch.randn_like(exact), exact)
    with pytest.raises(AssertionError, match="expected zeros"):
        assert_same_direction(exact, torch.zeros_like(exact))


def test_golden_file_is_complete():
    assert {"at_rep.loss", "at_zoo_p1.grad0", "kd_rep_T4.loss", "hl.out.0.weight"} <= golden().keys()


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(1000).isnan().all()


def test_threads_are_as_many_as_before_even_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), on_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        raise KeyError
    assert torch.get_num_threads() == before
