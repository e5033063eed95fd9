"""The least that a training step of the block takes, counted: `python -m benchmarks floors`.

Operations and bytes of each part, forward and backward, with one pass over memory for each part between the products
(kernels_ecmoe.py), in 16 bits. Seconds at the two ceilings of a card, its data sheet's unless others are given: the
larger of operations by their rate and bytes by the bandwidth. Nothing is measured here.
"""

import argparse

SIZES = {  # D, I, E, T, c
    "coarse": (4096, 14_336, 8, 16_384, 2),
    "fine": (2048, 768, 128, 16_384, 8),
}


def parts(hidden: int, width: int, experts: int, tokens: int, active: int) -> dict[str, tuple[float, float]]:
    """Operations and bytes of each part, forward and backward together."""
    rows = active * tokens
    token_bytes, row_bytes, inner_bytes = 2 * tokens * hidden, 2 * rows * hidden, 2 * rows * width
    weight_bytes = 2 * 3 * experts * hidden * width
    products = 3 * 2 * rows * 3 * hidden * width  # forward, and twice that in backward
    return {
        # Inputs read twice, their gradient written; scores in float32, a few times over.
        "router": (3 * 2 * tokens * hidden * experts, 3 * token_bytes + 4 * 4 * tokens * experts),
        # Scores read once to be ranked; written and read again as they are sorted.
        "choice": (0, 3 * 4 * tokens * experts),
        # Rows read and written; their gradients read, the tokens' written.
        "dispatch": (0, 3 * row_bytes + token_bytes),
        # Weights read twice and their gradients written; rows and inner rows read and written for each product.
        "products": (products, 3 * weight_bytes + 6 * row_bytes + 9 * inner_bytes),
        # Gate and up read, their product written; in backward these and a gradient read, three written.
        "activation": (0, (3 + 6) * inner_bytes),
        # Rows read, tokens written; in backward gradients and rows read, gradients of the rows written.
        "combine": (0, row_bytes + token_bytes + 3 * row_bytes),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks floors", description=__doc__.splitlines()[0])
    parser.add_argument("--flops", type=float, default=989e12, help="of 16-bit products per second; an H100 SXM's")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes per second; an H100 SXM's")
    options = parser.parse_args(arguments)
    for name, sizes in SIZES.items():
        counted = parts(*sizes)
        seconds = {part: max(ops / options.flops, size / options.bandwidth) for part, (ops, size) in counted.items()}
        whole = sum(seconds.values())
        print(f"\n{name}: D, I, E, T, c = {', '.join(f'{size:,}' for size in sizes)}\n")
        print("| part | TFLOP | GB | ms at the ceilings | share |\n| --- | ---: | ---: | ---: | ---: |")
        for part, (operations, size) in counted.items():
            share = seconds[part] / whole
            print(f"| {part} | {operations / 1e12:.2f} | {size / 1e9:.2f} | {seconds[part] * 1e3:.2f} | {share:.1%} |")
        print(f"| all | | | {whole * 1e3:.2f} | products {seconds['products'] / whole:.1%} |")


if __name__ == "__main__":
    main()
