"""Options that follow from the data: what a user of train.py does not set.

    derive(images=1281167, image_side=375, world_size=4, epochs=200, given={})   # the published run, exactly
    derive(images=1400, image_side=32, world_size=1, epochs=30, given={"nmb_prototypes": 3000})

Copy this file to use it elsewhere: it needs nothing else.
"""

from collections.abc import Mapping

LARGE_SET = 500_000  # images from which the published recipes hold, which were found on 1.28 million
SMALL_SET = 8_000  # images up to which rates are as found on 5,000, and blurs too weak to hide textures
LARGE_BATCH = 2048  # images a step from which the published rows for batches in the thousands hold
APEX_GROUP_SIZE = 8  # processes whose BatchNorm statistics these have in common
PUBLISHED_SIDE = 224  # pixels of the images from which crops are the published ones there
RELATIVE_EPSILON = 0.3  # of the scores' spread
CROP_LISTS = ("nmb_crops", "size_crops", "min_scale_crops", "max_scale_crops")
DERIVED = (
    "batch_size", *CROP_LISTS, "crops_for_assign", "blur_sigma", "stem", "nmb_prototypes", "temperature",
    "relative_epsilon", "epsilon", "queue_length", "epoch_queue_starts", "freeze_prototypes_niters",
    "base_lr", "final_lr", "warmup_epochs", "start_warmup", "sync_bn",
)  # fmt: skip


def derive(
    *, images: int, image_side: int, world_size: int, epochs: int, given: Mapping[str, object]
) -> dict[str, tuple[object, str]]:
    """Option: (value, reason), for all of DERIVED that are not given.

    images: in the training set. image_side: median of their shorter sides, in pixels. world_size: processes.
    given: what the user set, which is never overridden and which the rest follows. From half a million images on the
    values are the published ones (Caron et al. 2020, appendix A), for images that are large enough for their crops and
    runs of 150 epochs or more; below, those that `python bench.py collapse` supports.
    """
    derived: dict[str, tuple[object, str]] = {}

    def choose(name: str, value: object, reason: str) -> object:
        if given.get(name) is not None:
            return given[name]
        derived[name] = (value, reason)
        return value

    resolutions = next((len(given[name]) for name in CROP_LISTS if given.get(name) is not None), None)

    def choose_crops(*lists: list, reason: str) -> tuple[int, int]:
        """Lists as long as the user's, where some are given; crops of the first resolution, and the largest side."""
        nmb_crops, size_crops, *_ = (
            choose(name, values[:resolutions], reason) for name, values in zip(CROP_LISTS, lists, strict=True)
        )
        return nmb_crops[0], max(size_crops)

    def choose_epsilon(relative: str) -> None:
        value, reason = (RELATIVE_EPSILON, "of the scores' spread") if relative == "on" else (0.05, "published")
        choose("epsilon", value, reason)

    def choose_queue(length: int, reason: str, starts: int = min(15, epochs // 10)) -> None:
        used = choose("queue_length", length, reason)
        choose("epoch_queue_starts", starts, "published, and a tenth of the run at most" if used else "no queue")

    def choose_rates(base_lr: float, reason: str, warmup_epochs: int, warmup_reason: str) -> None:
        lr = choose("base_lr", round(base_lr, 6), reason)
        choose("final_lr", round(lr / 1000, 9), "a thousandth of base_lr, as published")
        warmup = choose("warmup_epochs", warmup_epochs, warmup_reason)
        choose("start_warmup", min(0.3, lr) if warmup else 0.0, "published")

    a_tenth = min(10, epochs // 10), "a tenth of the run and 10 at most, as published for large batches"

    large = min(224, max(32, 16 * round(0.75 * image_side / 16)))
    crops = [4], [large], [0.4], [1.0]
    why = f"{images:,} images of {image_side} pixels: milder crops than published"
    if images >= LARGE_SET and image_side >= PUBLISHED_SIDE:
        crops, why = ([2, 6], [224, 96], [0.14, 0.05], [1.0, 0.14]), "published, for a million images"
    elif resolutions not in (None, 1):
        crops = [2, 4], [large, max(16, 8 * round(large * 96 / 224 / 8))], [0.4, 0.15], [1.0, 0.5]
    first_crops, side = choose_crops(*crops, reason=why)
    if images >= LARGE_SET:
        choose("crops_for_assign", [0, 1], "published")
    else:
        why = "all of the first resolution: each predicts the others' codes"
        choose("crops_for_assign", list(range(max(2, first_crops))), why)
    if images <= SMALL_SET and side < PUBLISHED_SIDE:
        why = f"published 2 for {PUBLISHED_SIDE} pixels, in proportion for {side}, which else hides textures for long"
        choose("blur_sigma", round(2 * side / PUBLISHED_SIDE, 2), why)
    else:
        choose("blur_sigma", 2.0, "published")
    cheaper = ", at a quarter of small's cost" if side <= 32 else ""
    choose("stem", "imagenet" if side >= 96 else "medium", f"crops of {side} pixels{cheaper}")

    if images >= LARGE_SET:
        why = "published, for a million images"
        global_batch = world_size * choose("batch_size", 64, why)
        in_thousands = global_batch >= LARGE_BATCH
        in_groups = in_thousands and world_size % APEX_GROUP_SIZE == 0
        why_groups = (
            f"published: groups of {APEX_GROUP_SIZE} processes for batches from {LARGE_BATCH}, else all of them"
        )
        choose("sync_bn", "apex" if in_groups else "pytorch", why_groups)
        nmb_prototypes = choose("nmb_prototypes", 3000, why)
        choose("temperature", 0.1, why)
        relative = choose("relative_epsilon", "off", why)
        choose_epsilon(relative)
        if global_batch >= nmb_prototypes:
            choose_queue(0, f"the batch of {global_batch} covers {nmb_prototypes} prototypes")
        else:
            too_small = f"the batch of {global_batch} is too small for {nmb_prototypes} prototypes"
            if in_thousands:
                choose_queue(global_batch, too_small, starts=0)
            else:
                choose_queue(3840 - 3840 % global_batch, too_small)
        frozen = 313 if in_thousands else -(-images // global_batch)
        a_tenth_in_steps = epochs * images // global_batch // 10
        choose("freeze_prototypes_niters", min(frozen, a_tenth_in_steps), "published, and a tenth of the run at most")
        if in_thousands:
            choose_rates(4.8, f"published, for batches from {LARGE_BATCH}", *a_tenth)
        else:
            choose_rates(0.6 * global_batch / 256, "published 0.6 for 256, in proportion to the batch", 0, why)
        return derived

    batch_size = 64 if side >= 96 else 256  # per process, so that memory is enough
    most = min(images, max(16, min(64, images / 40), images / 200))
    while batch_size * world_size > most and batch_size > 2:
        batch_size //= 2
    why = "40 steps an epoch or more for a batch of up to 64 over all processes, 200 for larger ones"
    global_batch = world_size * choose("batch_size", batch_size, why)
    nmb_prototypes = max(30, round(2.65 * images**0.5 * min(1, images / 5000)))
    choose("nmb_prototypes", nmb_prototypes, "2.65 x the root of the images, fewer below 5,000 of them, 30 or more")
    choose("temperature", 0.15, "between 0.1, published, and 0.2: none of the three was clearly best")
    in_published_unit = given.get("epsilon") is not None
    why = "epsilon is given in the published unit" if in_published_unit else "so few images collapse with a fixed one"
    relative = choose("relative_epsilon", "off" if in_published_unit else "on", why)
    choose_epsilon(relative)
    choose_queue(0, "a small set's embeddings move too fast to be kept")
    choose("freeze_prototypes_niters", 0, "no gain seen from frozen prototypes")
    choose("sync_bn", "pytorch", "embeddings must not tell by which process they were made")
    why = "2.4 for a batch of 64, with the batch's root; from 8,000 images on falling with theirs, to the published 0.6"
    choose_rates(min(4.8, 0.3 * (global_batch * min(1, SMALL_SET / images)) ** 0.5), why, *a_tenth)
    return derived
