"""How real does the routing look? Four measures, compared with traces of published models.

All are computed per layer on runs of consecutive tokens of one domain and averaged over layers.
Popularity is the share of all (token, slot) assignments that an expert takes. "Independent" reuse
is what two draws from that same popularity would share: A * sum(share ** 2). The targets come from
routing traces of gpt-oss-20b, DeepSeek-V2-Lite and OLMoE, measured per task, so a domain is the
unit here as well.
"""

from itertools import combinations

import torch
from torch import Tensor

TARGETS = {
    "top_quarter": (0.40, 0.65),
    "max_over_mean": (2.5, 6.0),
    "reuse_ratio": (1.5, 2.2),
    "domain_cosine": (0.0, 0.75),
}


def popularity(ids: Tensor, num_experts: int) -> Tensor:
    """ids [L, N, S, A] -> share of assignments [L, E]."""
    counts = torch.stack([layer.flatten().bincount(minlength=num_experts) for layer in ids])
    return counts / counts.sum(1, keepdim=True)


def measures(ids: Tensor, num_experts: int) -> dict[str, float]:
    """ids [L, N, S, A], N runs of S consecutive tokens -> measures of a text, mean over layers."""
    share = popularity(ids, num_experts)
    top = share.sort(dim=1, descending=True).values[:, : num_experts // 4].sum(1)
    same = (ids[:, :, 1:, :, None] == ids[:, :, :-1, None, :]).any(-1).float()
    reuse = same.mean(dim=(1, 2, 3))  # [L]
    independent = ids.shape[-1] * share.square().sum(1)
    return {
        "top_quarter": top.mean().item(),
        "max_over_mean": (share.max(1).values * num_experts).mean().item(),
        "reuse": reuse.mean().item(),
        "independent": independent.mean().item(),
        "reuse_ratio": (reuse / independent).mean().item(),
        "unused_experts": (share == 0).sum(1).float().mean().item(),
    }


def domain_cosines(shares: dict[str, Tensor]) -> dict[str, float]:
    """Popularity [L, E] per domain -> cosine for each pair of domains, mean over layers."""
    return {
        f"{a}/{b}": torch.cosine_similarity(shares[a], shares[b], dim=1).mean().item()
        for a, b in combinations(shares, 2)
    }


def routing_report(ids: dict[str, Tensor], num_experts: int) -> dict:
    """ids [L, N, S, A] per domain -> measures per domain, of the equal mixture, and the headline.

    The headline is the mean over domains; `domain_cosine` is the mean over pairs of domains.
    """
    per_domain = {name: measures(i, num_experts) for name, i in ids.items()}
    shares = {name: popularity(i, num_experts) for name, i in ids.items()}
    cosines = domain_cosines(shares)
    rows = min(i.shape[1] for i in ids.values())
    headline = {
        key: sum(m[key] for m in per_domain.values()) / len(per_domain)
        for key in next(iter(per_domain.values()))
    }
    headline["domain_cosine"] = sum(cosines.values()) / len(cosines)
    headline["domain_cosine_max"] = max(cosines.values())
    return {
        "headline": headline,
        "per_domain": per_domain,
        "mixed": measures(torch.cat([i[:, :rows] for i in ids.values()], dim=1), num_experts),
        "cosines": cosines,
    }


def balance_loss(probs: Tensor, share: Tensor) -> Tensor:
    """Switch load-balancing loss of one layer minus its minimum: 0 when assignments are even.

    Args: probs [B, S, E] fp32 of this batch, share [E] of recent assignments over all domains (a
        running mean, so that a batch of few sequences is not pushed to be balanced by itself).
    """
    return probs.shape[-1] * (share * probs.mean(dim=(0, 1))).sum() - 1


def smoothness_loss(probs: Tensor) -> Tensor:
    """1 - cosine of neighbouring tokens' router distributions [B, S, E]: the knob for reuse."""
    return 1 - torch.cosine_similarity(probs[:, 1:], probs[:, :-1], dim=-1).mean()
