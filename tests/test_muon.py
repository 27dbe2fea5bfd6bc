"""Muon: its orthogonal matrix against singular values, its step against a plain loop and PyTorch's own optimisers."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extras.muon import COEFFICIENTS, Muon, orthogonal

any_time = settings(deadline=None)
SEEDS = st.integers(0, 2**31 - 1)


def gen(seed):
    return torch.Generator().manual_seed(seed)


def rounds_on(values, rounds=5):
    """What Newton-Schulz makes of singular values: the same polynomial, on numbers."""
    a, b, c = COEFFICIENTS
    for _ in range(rounds):
        values = a * values + b * values**3 + c * values**5
    return values


@any_time
@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.integers(0, 6))
def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values(seed, rows, columns, rounds):
    matrix = torch.randn(rows, columns, generator=gen(seed), dtype=torch.float64)
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    expected = U @ torch.diag(rounds_on(S / S.norm(), rounds)) @ V
    torch.testing.assert_close(orthogonal(matrix, rounds), expected, rtol=1e-8, atol=1e-8)


@any_time
@given(SEEDS, st.floats(1e-6, 1e6))
def test_the_size_of_a_gradient_does_not_matter(seed, factor):
    matrix = torch.randn(4, 6, generator=gen(seed), dtype=torch.float64)
    torch.testing.assert_close(orthogonal(factor * matrix), orthogonal(matrix))


@any_time
@given(st.floats(0.02, 1))
def test_five_rounds_bring_every_singular_value_near_one(value):
    assert 0.65 < rounds_on(torch.tensor(value, dtype=torch.float64)) < 1.25


def test_a_gradient_of_zeros_makes_no_step_and_no_nan():
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


def groups_of(parameters, orthogonal, decay):
    return dict(params=parameters, weight_decay=decay, orthogonal=orthogonal)


@any_time
@given(SEEDS, st.sampled_from([(3, 5), (6, 2), (4, 3, 2, 2)]))
def test_a_step_on_a_matrix_is_the_one_written_out(seed, shape):
    draw = gen(seed)
    start = torch.randn(shape, generator=draw, dtype=torch.float64)
    ours, lr, decay = torch.nn.Parameter(start.clone()), 0.1, 0.3
    optimizer = Muon([groups_of([ours], True, decay)], lr=lr)
    expected, momentum = start.flatten(1), torch.zeros_like(start.flatten(1))
    for _ in range(3):
        gradient = torch.randn(shape, generator=draw, dtype=torch.float64)
        ours.grad = gradient.clone()
        optimizer.step()
        flat = gradient.flatten(1)
        momentum = 0.95 * momentum + 0.05 * flat
        U, S, V = torch.linalg.svd(0.05 * flat + 0.95 * momentum, full_matrices=False)
        turned = U @ torch.diag(rounds_on(S / S.norm())) @ V
        expected = expected - lr * decay * expected - lr * 0.5 * max(flat.shape) ** 0.5 * turned
    torch.testing.assert_close(ours.detach().flatten(1), expected, rtol=1e-7, atol=1e-7)


def test_a_step_is_that_of_pytorchs_own_muon_up_to_its_bf16():
    start, gradient = torch.randn(2, 8, 24, generator=gen(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    Muon([groups_of([ours], True, 0.0)], lr=0.1).step()
    torch.optim.Muon([theirs], lr=0.1 * 0.5 / 0.2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.05 * moved


@any_time
@given(SEEDS)
def test_all_other_parameters_take_adamws_step_and_those_without_gradient_none(seed):
    draw = gen(seed)
    start = torch.randn(3, 4, 5, generator=draw)
    ours = [torch.nn.Parameter(value.clone()) for value in start]
    theirs = torch.nn.Parameter(start[0].clone())
    optimizer = Muon([groups_of(ours[:1], False, 0.1), groups_of(ours[1:], True, 0.1)], lr=0.1, fused=True)
    usual = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(3):
        ours[0].grad = torch.randn(4, 5, generator=draw)
        theirs.grad = ours[0].grad.clone()
        optimizer.step()
        usual.step()
    assert torch.equal(ours[0], theirs)
    assert torch.equal(ours[1], start[1]) and torch.equal(ours[2], start[2])
    assert set(optimizer.state) == {ours[0]}
