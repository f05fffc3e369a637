"""docs/method.md against the code: numbers are recomputed, links, tests and functions exist."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from scipy import optimize, stats

from dina_lrm.core.likelihood import pairwise_loss, thurstone_log_likelihood, win_probability
from dina_lrm.core.noise import NoiseSchedule

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "method.md"
pytestmark = pytest.mark.skipif(not DOCUMENT.exists(), reason=f"no {DOCUMENT}")

TEXT = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
LINKS = re.findall(r"\[`([^`]+)`\]\((\.\./[^)#]+)\)", TEXT)


def table(name: str) -> list[list[float]]:
    """Rows of the table below `<!-- table: name -->`."""
    lines = TEXT.split(f"<!-- table: {name} -->\n")[1].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([float(cell) for cell in line.strip("| ").split("|")])
    return rows


def printed(value: float) -> object:
    """Three significant digits, as printed; a stationary point is printed as 0."""
    return pytest.approx(value, rel=6e-3, abs=1e-12)


def loss_and_gradient(u: float, loss: str, y: float, eps: float) -> tuple[float, float]:
    """At s = 1, that is variance 1/2."""
    chosen = torch.tensor([u], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    target = torch.tensor([y], dtype=torch.float64)
    value = pairwise_loss(
        chosen, zero, zero, likelihood="thurstone_constant", loss=loss, target=target, eps=eps
    )
    (gradient,) = torch.autograd.grad(value.sum(), chosen)
    return value.item(), gradient.item()


def test_links_lead_somewhere():
    assert len(LINKS) > 50
    missing = {path for _, path in LINKS if not (DOCUMENT.parent / path).exists()}
    assert not missing


@pytest.mark.parametrize(("name", "path"), sorted(set(LINKS)))
def test_named_functions_and_tests_exist(name, path):
    file = DOCUMENT.parent / path
    if name == file.name:
        return
    parts = name.split("::")[1:] if "::" in name else name.split(".")
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for part in parts:
        found = [
            node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part
        ]
        assert found, f"{part} is not in {path}"
        body = found[0].body


def test_every_equation_has_a_number_and_every_number_is_used_once():
    numbers = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", TEXT)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_variance_table():
    rows = table("variance")
    assert len(rows) == 7
    for sigma, variance, spread, scale, p, margin in rows:
        half = torch.tensor([0.5], dtype=torch.float64)
        assert variance == pytest.approx(2 * sigma**2 + 0.05, abs=5e-4)
        assert spread == pytest.approx(math.sqrt(2 * (2 * sigma**2 + 0.05)), abs=5e-4)
        assert scale == pytest.approx(1 / math.sqrt(2 * (2 * sigma**2 + 0.05)), abs=5e-4)
        assert p == pytest.approx(win_probability(half, torch.tensor([sigma])).item(), abs=5.1e-4)
        back = win_probability(torch.tensor([margin]).double(), torch.tensor([sigma]))
        assert back.item() == pytest.approx(0.75, abs=1e-3)


def test_gradient_table():
    rows = table("gradients")
    assert len(rows) == 11
    for u, p, nll, nll_gradient, fidelity, fidelity_gradient, ratio, with_eps in rows:
        log_p = thurstone_log_likelihood(
            torch.tensor([u]).double(), torch.zeros(1).double(), torch.zeros(1).double(), floor=0.5
        )
        assert p == printed(log_p.exp().item())
        assert (nll, nll_gradient) == tuple(map(printed, loss_and_gradient(u, "log_likelihood", 1.0, 0.0)))
        assert (fidelity, fidelity_gradient) == tuple(
            map(printed, loss_and_gradient(u, "fidelity", 1.0, 0.0))
        )
        assert ratio == printed((log_p / 2).exp().item() / 2)
        assert with_eps == printed(loss_and_gradient(u, "fidelity", 1.0, 1e-6)[1])


def test_soft_label_table():
    rows = table("soft")
    assert len(rows) == 10
    for u, p, nll_gradient, fidelity_gradient in rows:
        u = float(stats.norm.ppf(0.7)) if u == 0.5244 else u
        assert p == printed(float(stats.norm.cdf(u)))
        assert nll_gradient == printed(loss_and_gradient(u, "log_likelihood", 0.7, 0.0)[1])
        assert fidelity_gradient == printed(loss_and_gradient(u, "fidelity", 0.7, 0.0)[1])


def test_numbers_in_the_text():
    peak = optimize.minimize_scalar(
        lambda u: loss_and_gradient(u, "fidelity", 1.0, 0.0)[1], bounds=(-4, 4), method="bounded"
    )
    assert "largest at $u = -0.612$, $p = 0.270$, where it is 0.318" in TEXT
    assert peak.x == pytest.approx(-0.612, abs=5e-4)
    assert stats.norm.cdf(peak.x) == pytest.approx(0.270, abs=5e-4)
    assert -peak.fun == pytest.approx(0.318, abs=5e-4)

    assert "pulls 64,000 times less" in TEXT
    log_likelihood, fidelity = (
        loss_and_gradient(-6.0, loss, 1.0, 0.0)[1] for loss in ("log_likelihood", "fidelity")
    )
    assert log_likelihood / fidelity == pytest.approx(64_000, rel=0.01)

    assert "the same to 2 % down to $u = -4$" in TEXT
    for u in (-4.0, -3.0, 0.0, 3.0):
        plain, with_eps = (loss_and_gradient(u, "fidelity", 1.0, eps)[1] for eps in (0.0, 1e-6))
        assert with_eps == pytest.approx(plain, rel=0.02)

    assert "a wanted $\\sigma = 0$ becomes 0.002994" in TEXT
    assert NoiseSchedule.rectified_flow(3.0).match(torch.zeros(1)).sigma.item() == pytest.approx(
        0.002994, abs=5e-7
    )

    assert "within 0.0095 of $\\Phi(d / 1.702)$" in TEXT
    d = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    assert (d.sigmoid() - torch.special.ndtr(d / 1.702)).abs().max().item() == pytest.approx(0.0095, abs=5e-5)


@pytest.mark.parametrize(
    ("width", "embedding", "image_taps", "text_taps"), [(16, 16, 2, 3), (1536, 1536, 3, 3)]
)
def test_parameter_formulas(width, embedding, image_taps, text_taps):
    from dina_lrm.models.head import RewardHead

    with torch.device("meta"):
        head = RewardHead(
            image_dims=[width] * image_taps,
            text_dims=[width] * text_taps,
            embedding_dim=embedding,
            num_attention_heads=8,
        )
    w, e, f, n = width, embedding, width // 4, image_taps + text_taps
    film = 2 * w * (e + 1) + 2 * w * (2 * w + 1) + w + f * (w + 1)
    aggregation = w * (image_taps * f + 1) + w * (text_taps * f + 1)
    attention_1 = 6 * w * (w + 1) + 3 * w + 2 * (w * (w + 1) + w + 1)
    attention_2 = 4 * w * (w + 1) + 2 * w
    feed_forward = 8 * w**2 + 6 * w
    queries_and_output = 4 * w + w + 1
    total = n * film + aggregation + attention_1 + attention_2 + feed_forward + queries_and_output
    assert sum(p.numel() for p in head.parameters()) == total
    if width == 1536:
        assert total == 139_296_003  # the published checkpoint's head


def test_parameter_table():
    """The printed SD3.5-Medium column is what the command counts, and adds up to the published checkpoint."""
    from benchmarks.parameter_table import PARTS, count_parts, sd35_medium

    model = sd35_medium()
    counts = count_parts(model)
    head = sum(count for part, count in counts.items() if PARTS[part].startswith("head"))
    backbone = sum(count for part, count in counts.items() if PARTS[part].startswith("backbone"))
    assert (head, counts["lora"], backbone) == (139_296_003, 28_311_552, 1_232_739_840)
    assert model.num_parameters()["trainable"] == 167_607_555

    lines = (
        TEXT.split("<!-- parameter-table:begin -->\n")[1]
        .split("<!-- parameter-table:end -->")[0]
        .splitlines()
    )
    column = [cell.strip() for cell in lines[0].split("|")].index("SD3.5-Medium")
    stated = {
        cells[1].strip(): cells[column].strip(" *") for cells in (line.split("|") for line in lines[2:])
    }
    for part, count in counts.items():
        assert count == 0 or stated[PARTS[part]] == f"{count:,}"
    assert stated["**trained**"] == "167,607,555"
