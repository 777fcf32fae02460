"""`python -m attention_surgery.cost` prints the tables of docs/cost.md."""

from typing import Any

from ..models.wan import WanSpec
from ..rates import Rate
from .report import profile

MODELS = {
    "Wan2.1 1.3B": WanSpec(blocks=30, heads=12, head_dim=128, ffn_dim=8960),
    "Wan2.1 / 2.2 14B": WanSpec(blocks=40, heads=40, head_dim=128, ffn_dim=13824),
    "Wan2.2 TI2V 5B": WanSpec(blocks=30, heads=24, head_dim=128, ffn_dim=14336, vae_scale=(4, 16, 16)),
}
SIZES = {
    "Wan2.1 1.3B": ((81, 480, 832), (81, 320, 480)),
    "Wan2.1 / 2.2 14B": ((81, 480, 832), (81, 720, 1280)),
    "Wan2.2 TI2V 5B": ((81, 704, 1280), (121, 704, 1280)),
}
CONVERSIONS: tuple[tuple[int, Rate], ...] = (
    (15, 2),
    (15, 4),
    (15, 8),
    (20, 4),
    (20, 8),
    (25, 8),
    (30, 8),
    (20, "linear"),
)


def markdown() -> str:
    """Both tables: where the FLOPs of all-softmax models go, and what remains of Wan2.1 1.3B at given conversions."""
    shares = [
        "| model | frames × height × width | tokens | TFLOP, all blocks | self-attention, % | core, % |",
        "|---|---|--:|--:|--:|--:|",
    ]
    remaining = [
        "| frames × height × width | "
        + " | ".join(f"{count} × {'linear' if rate == 'linear' else f'R = {rate}'}" for count, rate in CONVERSIONS)
        + " |",
        "|---" * (len(CONVERSIONS) + 1) + "|",
    ]
    for name, sizes in SIZES.items():
        for num_frames, height, width in sizes:
            size: dict[str, Any] = {"num_frames": num_frames, "height": height, "width": width}
            label = f"{num_frames} × {height} × {width}"
            report = profile(MODELS[name], **size)
            shares.append(
                f"| {name} | {label} | {report.tokens:,} | {report.total_flops / 1e12:,.1f} "
                f"| {100 * report.attention_share:.1f} | {100 * report.core_share:.1f} |"
            )
            if name == "Wan2.1 1.3B":
                parts = [
                    profile(MODELS[name], **size, rates=dict.fromkeys(range(count), rate)).remaining
                    for count, rate in CONVERSIONS
                ]
                remaining.append(f"| {label} | " + " | ".join(f"{100 * part:.1f}" for part in parts) + " |")
    return "\n".join((*shares, "", *remaining))


if __name__ == "__main__":
    print(markdown())
