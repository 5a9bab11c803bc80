"""Options that follow from the data: what a user of train.py does not set.

    derive(images=1281167, image_side=375, world_size=4, epochs=200, given={})   # the published run, exactly
    derive(images=1400, image_side=32, world_size=1, epochs=30, given={"nmb_prototypes": 3000})

Copy this file to use it elsewhere: it needs nothing else.
"""

from collections.abc import Mapping

LARGE_SET = 500_000  # images from which the published recipes hold, which were found on 1.28 million
LARGE_BATCH = 2048  # images a step from which the published rows for batches in the thousands hold
CROP_LISTS = ("nmb_crops", "size_crops", "min_scale_crops", "max_scale_crops")
DERIVED = (
    "batch_size", *CROP_LISTS, "stem", "nmb_prototypes", "temperature", "relative_epsilon", "epsilon",
    "queue_length", "epoch_queue_starts", "freeze_prototypes_niters",
    "base_lr", "final_lr", "warmup_epochs", "start_warmup",
)  # fmt: skip


def derive(
    *, images: int, image_side: int, world_size: int, epochs: int, given: Mapping[str, object]
) -> dict[str, tuple[object, str]]:
    """Option: (value, reason), for all of DERIVED that are not given.

    images: in the training set. image_side: median of their shorter sides, in pixels. world_size: processes.
    given: what the user set, which is never overridden and which the rest follows. From half a million images on the
    values are the published ones (Caron et al. 2020, appendix A), below those that `python bench.py collapse` supports.
    """
    derived: dict[str, tuple[object, str]] = {}

    def choose(name: str, value: object, reason: str) -> object:
        if given.get(name) is not None:
            return given[name]
        derived[name] = (value, reason)
        return value

    is_large = images >= LARGE_SET
    published = "published, for a million images"

    batch_size = 64
    while not is_large and batch_size * world_size > min(images, max(16, images / 40)) and batch_size > 2:
        batch_size //= 2
    steps_told = published if is_large else "at least 40 steps an epoch, if the batch can have 16 images"
    global_batch = world_size * choose("batch_size", batch_size, steps_told)
    is_large_batch = is_large and global_batch >= LARGE_BATCH
    steps_per_epoch = -(-images // global_batch)

    # Crops: lists of one entry where the user gave such, else of two
    resolutions = next((len(given[name]) for name in CROP_LISTS if given.get(name) is not None), 2)
    sizes = [224, 96]
    if not is_large:
        large = min(224, max(32, 16 * round(0.75 * image_side / 16)))
        sizes = [large, max(16, 8 * round(large * 96 / 224 / 8))]
    milder = "a smaller set needs milder crops"
    choose("nmb_crops", [2, 6 if is_large else 4][:resolutions], published if is_large else "two large, four small")
    sizes = choose("size_crops", sizes[:resolutions], f"images of {image_side} pixels")
    choose(
        "min_scale_crops", ([0.14, 0.05] if is_large else [0.4, 0.15])[:resolutions], published if is_large else milder
    )
    choose(
        "max_scale_crops", ([1.0, 0.14] if is_large else [1.0, 0.5])[:resolutions], published if is_large else milder
    )
    stem = "imagenet" if max(sizes) >= 96 else "medium"
    cheaper = ", at a quarter of small's cost" if max(sizes) <= 32 else ""
    choose("stem", stem, f"crops of {max(sizes)} pixels{cheaper}")

    # Codes
    prototypes = 3000 if is_large else max(30, min(3000, round(2.65 * images**0.5)))
    nmb_prototypes = choose("nmb_prototypes", prototypes, published if is_large else "2.65 x the root of the images")
    choose("temperature", 0.1 if is_large else 0.2, published if is_large else "softer predictions draw together less")
    by_spread = not is_large and given.get("epsilon") is None
    why = "so few images collapse with a fixed one" if by_spread else "as published"
    by_spread = choose("relative_epsilon", "on" if by_spread else "off", why) == "on"
    choose("epsilon", 0.3 if by_spread else 0.05, "of the scores' spread" if by_spread else "published")

    # Queue: K prototypes are balanced over as many images, where embeddings of past batches are still true
    if not is_large:
        choose("queue_length", 0, "embeddings move too fast to be kept")
    elif global_batch >= nmb_prototypes:
        choose("queue_length", 0, f"the batch of {global_batch} is enough for {nmb_prototypes} prototypes")
    else:
        length = global_batch if is_large_batch else 3840 - 3840 % global_batch
        choose("queue_length", length, f"the batch of {global_batch} is too small for {nmb_prototypes} prototypes")
    choose("epoch_queue_starts", 0 if is_large_batch and global_batch < nmb_prototypes else 15, "published")
    frozen = 0 if not is_large else 313 if is_large_batch else steps_per_epoch
    choose("freeze_prototypes_niters", frozen, published if is_large else "no gain seen from frozen prototypes")

    # Learning rate
    if is_large_batch:
        lr, why = 4.8, f"published, for batches from {LARGE_BATCH}"
    elif is_large:
        lr, why = 0.6 * global_batch / 256, "published 0.6 for 256, in proportion to the batch"
    else:
        lr, why = min(4.8, 0.3 * global_batch**0.5), "2.4 for a batch of 64, with the batch's root"
    lr = choose("base_lr", round(lr, 6), why)
    choose("final_lr", round(lr / 1000, 9), "a thousandth of base_lr")
    warmup = choose("warmup_epochs", min(10, epochs // 10) if is_large_batch else 0, "published")
    choose("start_warmup", min(0.3, lr) if warmup else 0.0, "published")
    return derived
