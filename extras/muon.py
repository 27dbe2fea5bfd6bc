"""Muon (Jordan et al., 2024): gradient descent whose steps on matrices are orthogonal; AdamW for all the rest."""

import torch

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a, b, c of X <- a X + (b X X' + c (X X')^2) X, as Muon's authors chose them


def orthogonal(matrix, rounds=5):
    """
    The nearest orthogonal matrix, roughly: for the singular value decomposition U S V' about U V'. A few Newton-Schulz
    rounds bring most singular values between 0.7 and 1.2 (the smallest stay below), with matrix products alone.
    """
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    a, b, c = COEFFICIENTS
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.AdamW):
    """
    Groups with orthogonal=True take Muon's step, the others AdamW's. The size of Muon's does not depend on the shape of
    the matrix (Liu et al., 2025), so that both share the learning rate and the weight decay.
    """

    MOMENTUM = 0.95
    SIZE = 0.5  # AdamW's is about 0.2 (Liu et al.); 0.5 was chosen on the demo (EXPERIMENTS.md)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"] if group["orthogonal"] else ():
                if p.grad is not None:
                    self.turn(p, group["lr"], group["weight_decay"])
                    p.grad = None  # used up: AdamW's step below passes it by
        super().step()

    def turn(self, p, lr, weight_decay):
        """Nesterov's momentum of the gradient, made orthogonal. Its state has the names of AdamW's."""
        state = self.state[p]
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
        state["step"] += 1
        state["exp_avg"].lerp_(p.grad, 1 - self.MOMENTUM)
        update = orthogonal(p.grad.lerp(state["exp_avg"], self.MOMENTUM).flatten(1))
        size = self.SIZE * max(update.shape) ** 0.5  # the root mean square of the step, over lr, is about SIZE
        p.mul_(1 - lr * weight_decay).add_(update.view_as(p), alpha=-lr * size)
