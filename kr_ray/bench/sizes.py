"""How large the benchmark's work is: for a CPU, for a GPU, and so tiny that a test can run it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """Sizes of all suites.

    Attributes:
        image_size, architecture, gan_channels, gan_batch: of the generator;
            `architecture` names channel tables of the config.
        augmented_images, loader_images: per call, in the product and in its
            counterpart, which are compared per image.
        steps: (width, batch, steps per call) of the classifier suites, the first
            of which is the student of the others.
        optimised: (ResNet14's width, generator's channels) of the optimiser suite.
        generated_images, generation_batch: per call of the generation suite, and per forward pass.
        student_images, student_epochs, regeneration_rate: of a GKD student.
        sweep_width, sweep_images, sweep_epochs: of the students that run in other processes.
        attack_classes, attack_rows: of the shadow attack; features are as many as classes.
        audit_runs, audit_canaries, audit_queries: of the worst-case attack.
        matrix_side, copied_bytes: of the yardsticks.
    """

    image_size: int
    architecture: str
    gan_channels: int
    gan_batch: int
    augmented_images: int
    loader_images: int
    steps: tuple[tuple[int, int, int], ...]
    optimised: tuple[int, int]
    generated_images: int
    generation_batch: int
    student_images: int
    student_epochs: int
    regeneration_rate: int
    sweep_width: int
    sweep_images: int
    sweep_epochs: int
    attack_classes: int
    attack_rows: int
    audit_runs: int
    audit_canaries: int
    audit_queries: int
    matrix_side: int
    copied_bytes: int


CPU = Sizes(
    image_size=32,
    architecture="studiogan32",
    gan_channels=32,
    gan_batch=64,
    augmented_images=1024,
    loader_images=1024,
    steps=((16, 256, 4), (64, 128, 1)),
    optimised=(64, 64),
    generated_images=256,
    generation_batch=128,
    student_images=512,
    student_epochs=4,
    regeneration_rate=2,
    sweep_width=16,
    sweep_images=512,
    sweep_epochs=8,
    attack_classes=10,
    attack_rows=9000,
    audit_runs=64,
    audit_canaries=500,
    audit_queries=18,
    matrix_side=2048,
    copied_bytes=256 * 2**20,
)

GPU = replace(
    CPU,
    gan_channels=128,
    augmented_images=25_600,
    loader_images=2048,
    steps=((64, 256, 100), (16, 256, 100)),
    optimised=(64, 128),
    generated_images=10_240,
    generation_batch=1024,
    student_images=11_959,  # BloodMNIST's training split
    student_epochs=100,
    regeneration_rate=10,
    sweep_width=64,
    sweep_images=11_959,
    sweep_epochs=10,
    matrix_side=8192,
    copied_bytes=2**31,
)
