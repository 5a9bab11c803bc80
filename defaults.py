"""Options that follow from the data: those that a user of train.py leaves open.

    derive(images=1281167, image_side=375, world_size=4, epochs=200, given={})   # exactly the paper's batch of 256
    derive(images=1400, image_side=32, world_size=1, epochs=30, given={"nmb_prototypes": 3000})

Copy this file to use it elsewhere: it needs nothing else.
"""

from collections.abc import Callable, Mapping

LARGE_SET = 500_000  # images from which the paper's recipes are used, which were found on 1.28 million
SMALL_SET = 8_000  # images up to which the learning rate and the weaker blur are as found on 5,000
LARGE_BATCH = 2048  # images per step from which the paper's recipes for batches in the thousands are used
APEX_GROUP_SIZE = 8  # processes that share BatchNorm statistics in these recipes
PAPER_SIDE = 224  # pixels of an image from which the paper's crops are used
RELATIVE_EPSILON = 0.3  # in units of the scores' standard deviation
# What images show, by the shares that features.describe_images measures
PLAIN_GROUND = 0.25  # from here on objects lie on a plain ground (photographs 0.14, patches of them 0.18, digits 0.35)
MEAN_IMAGE = 0.1  # from here on images are aligned (photographs 0.02, digits and clothes 0.3)
BETWEEN_CELLS = 0.27  # below, images are textures (drawn ones 0.2, photographs 0.5, noise of 1 / frequency 0.34)
# From both on, flips give images that the set lacks (digits 0.86 and 0.34, photographs 0.5 and 0.02)
MIRROR_IMAGES, ALIGNED = 0.6, 0.23
CROP_LISTS = ("nmb_crops", "size_crops", "min_scale_crops", "max_scale_crops")
DERIVED = (
    "batch_size", *CROP_LISTS, "crops_for_assign", "hflip", "color_strength", "blur_sigma", "stem", "nmb_prototypes",
    "temperature", "relative_epsilon", "epsilon", "queue_length", "epoch_queue_starts", "freeze_prototypes_niters",
    "base_lr", "final_lr", "warmup_epochs", "start_warmup", "sync_bn",
)  # fmt: skip
Choose = Callable[[str, object, str], object]  # (option, value, reason) -> the value in effect


def derive(
    *,
    images: int,
    image_side: int,
    world_size: int,
    epochs: int,
    given: Mapping[str, object],
    described: Mapping[str, float] | None = None,
    init: bool = False,
) -> dict[str, tuple[object, str]]:
    """Derive every option of DERIVED that is not given: {option: (value, reason)}.

    images: number in the training set. image_side: median of their shorter sides in pixels. world_size: processes.
    given: what the user set. It is kept, and the other options adapt to it. described: the images, by
    features.describe_images; None if unknown (it counts below half a million images only). init: whether the backbone
    starts from weights. It changes no value: on two small sets a quarter of the learning rate gave worse features than
    all of it, from such a start too, and the warm-up made no difference. From half a million images on the values are
    the paper's (Caron et al. 2020, appendix A), for images large enough for its crops and runs of 150 epochs or more;
    below, those that `python -m bench collapse` and `learn` support.
    """
    derived: dict[str, tuple[object, str]] = {}

    def choose(name: str, value: object, reason: str) -> object:
        if given.get(name) is not None:
            return given[name]
        derived[name] = (value, reason)
        return value

    resolutions = next((len(given[name]) for name in CROP_LISTS if given.get(name) is not None), None)
    kind = "unknown" if described is None or images >= LARGE_SET else kind_of_images(described)
    side = crop_options(choose, images=images, image_side=image_side, resolutions=resolutions, kind=kind)
    if kind != "unknown" and described["mean_image"] >= ALIGNED and described["mirror_images"] >= MIRROR_IMAGES:
        choose("hflip", 0.0, "aligned objects that face one way: flips would make images that the set lacks")
    else:
        choose("hflip", 0.5, "as in the paper")
    if images >= LARGE_SET:
        paper_options(choose, images=images, world_size=world_size, epochs=epochs)
    else:
        sharing = dict(side=side, world_size=world_size, epochs=epochs, given=given, init=init)
        small_data_options(choose, images=images, **sharing)
    return derived


def kind_of_images(described: Mapping[str, float]) -> str:
    """What images show: "objects on a plain ground", "aligned objects", "textures" or "photographs"."""
    if described["plain_ground"] >= PLAIN_GROUND:
        return "objects on a plain ground"
    if described["mean_image"] >= MEAN_IMAGE:
        return "aligned objects"
    return "textures" if described["between_cells"] < BETWEEN_CELLS else "photographs"


def crop_options(choose: Choose, *, images: int, image_side: int, resolutions: int | None, kind: str) -> int:
    """Choose crops, what follows from them, jitter, blur and the stem.

    resolutions: as many as the user's lists have, or None. kind: of `kind_of_images`, or "unknown". Returns the side
    of the largest crops in pixels.
    """
    large = min(224, max(32, 16 * round(0.75 * image_side / 16)))
    small = max(16, 8 * round(large * 96 / 224 / 8))
    color_strength, why = 1.0, "as in the paper"
    if images >= LARGE_SET and image_side >= PAPER_SIDE:
        counts, sizes, reason = [2, 6], [224, 96], "as in the paper, for a million images"
        least, most, scales_reason = [0.14, 0.05], [1.0, 0.14], reason
    else:
        resolutions = resolutions or 1
        counts, sizes = [4] if resolutions == 1 else [2, 4], [large, small]
        reason = f"for {images:,} images of {image_side} pixels"
        if kind == "photographs":
            least, most = [0.14, 0.05], [1.0, 0.14]
            scales_reason = "as in the paper: these look like photographs, of which small parts tell much"
            color_strength, why = 0.5, "half the paper's, which is better for photographs"
        else:
            least, most = [0.4, 0.15], [1.0, 0.5]
            scales_reason = "milder crops than the paper's" + (f", for {kind}" if kind != "unknown" else "")
    nmb_crops = choose("nmb_crops", counts[:resolutions], reason)
    side = max(choose("size_crops", sizes[:resolutions], reason))
    choose("min_scale_crops", least[:resolutions], scales_reason)
    choose("max_scale_crops", most[:resolutions], scales_reason)
    if images >= LARGE_SET:
        choose("crops_for_assign", [0, 1], "as in the paper")
    else:
        reason = "all crops of the first resolution get codes, so each predicts several others"
        choose("crops_for_assign", list(range(max(2, nmb_crops[0]))), reason)
    choose("color_strength", color_strength, why)
    if images <= SMALL_SET and side < PAPER_SIDE:
        reason = f"the paper's 2 for {PAPER_SIDE} pixels, in proportion for {side}: more would hide textures"
        choose("blur_sigma", round(2 * side / PAPER_SIDE, 2), reason)
    else:
        choose("blur_sigma", 2.0, "as in the paper")
    cheaper = ", at a quarter of the cost of small" if side <= 32 else ""
    choose("stem", "imagenet" if side >= 96 else "medium", f"for crops of {side} pixels{cheaper}")
    return side


def paper_options(choose: Choose, *, images: int, world_size: int, epochs: int) -> None:
    """Choose the other options for large sets, as in the paper."""
    reason = "as in the paper, for a million images"
    global_batch = world_size * choose("batch_size", 64, reason)
    in_thousands = global_batch >= LARGE_BATCH
    in_groups = in_thousands and world_size % APEX_GROUP_SIZE == 0
    groups = f"as in the paper: groups of {APEX_GROUP_SIZE} processes for batches from {LARGE_BATCH} on, else all"
    choose("sync_bn", "apex" if in_groups else "pytorch", groups)
    nmb_prototypes = choose("nmb_prototypes", 3000, reason)
    choose("temperature", 0.1, reason)
    choose_epsilon(choose, choose("relative_epsilon", "off", reason))
    too_small = f"the batch of {global_batch} is smaller than {nmb_prototypes} prototypes"
    if global_batch >= nmb_prototypes:
        choose_queue(choose, epochs, 0, f"the batch of {global_batch} is at least {nmb_prototypes} prototypes")
    elif in_thousands:
        choose_queue(choose, epochs, global_batch, too_small, starts=0)
    else:
        choose_queue(choose, epochs, 3840 - 3840 % global_batch, too_small)
    frozen = 313 if in_thousands else -(-images // global_batch)  # an epoch: 313 steps of 4096, in the paper
    tenth = epochs * images // global_batch // 10
    choose("freeze_prototypes_niters", min(frozen, tenth), "as in the paper, at most a tenth of the run")
    if in_thousands:
        choose_learning_rates(choose, epochs, 4.8, f"as in the paper, for batches from {LARGE_BATCH} on", warm_up=True)
    else:
        lr = 0.6 * global_batch / 256
        choose_learning_rates(choose, epochs, lr, "the paper's 0.6 for 256, in proportion to the batch", warm_up=False)


def small_data_options(
    choose: Choose, *, images: int, side: int, world_size: int, epochs: int, given: Mapping[str, object], init: bool
) -> None:
    """Choose the other options for sets of fewer than half a million images."""
    batch_size = 64 if side >= 96 else 256  # per process, so that it fits into memory
    largest = min(images, max(16, min(64, images / 40), images / 200))
    while batch_size * world_size > largest and batch_size > 2:
        batch_size //= 2
    reason = "16 to 64 images over all processes, for at least 40 steps per epoch; more than 64 if 200 steps remain"
    global_batch = world_size * choose("batch_size", batch_size, reason)
    nmb_prototypes = max(30, round(2.65 * images**0.5 * min(1, images / 5000)))
    choose("nmb_prototypes", nmb_prototypes, "2.65 sqrt(images), fewer below 5,000 images, at least 30")
    choose("temperature", 0.15, "between the paper's 0.1 and 0.2: none of the three was clearly best")
    is_absolute = given.get("epsilon") is not None
    reason = "epsilon is given without a unit" if is_absolute else "with an absolute epsilon small sets may collapse"
    choose_epsilon(choose, choose("relative_epsilon", "off" if is_absolute else "on", reason))
    choose_queue(choose, epochs, 0, "embeddings of small sets change too fast to be kept")
    choose("freeze_prototypes_niters", 0, "freezing prototypes gained nothing")
    choose("sync_bn", "pytorch", "embeddings must not encode the process that made them")
    lr = min(4.8, 0.3 * (global_batch * min(1, SMALL_SET / images)) ** 0.5)
    reason = f"2.4 for a batch of 64, as the square root of the batch; above {SMALL_SET:,} images less"
    reason += "; lower ones were worse with --init too" if init else ""
    choose_learning_rates(choose, epochs, lr, reason, warm_up=True)


def choose_epsilon(choose: Choose, relative: str) -> None:
    value, reason = (RELATIVE_EPSILON, "in units of the scores' std") if relative == "on" else (0.05, "as in the paper")
    choose("epsilon", value, reason)


def choose_queue(choose: Choose, epochs: int, length: int, reason: str, starts: int | None = None) -> None:
    starts = min(15, epochs // 10) if starts is None else starts
    used = choose("queue_length", length, reason)
    choose("epoch_queue_starts", starts, "as in the paper, at most a tenth of the run" if used else "no queue")


def choose_learning_rates(choose: Choose, epochs: int, base_lr: float, reason: str, warm_up: bool) -> None:
    base_lr = choose("base_lr", round(base_lr, 6), reason)
    choose("final_lr", round(base_lr / 1000, 9), "a thousandth of base_lr, as in the paper")
    why = "a tenth of the run, at most 10, as in the paper for large batches" if warm_up else "as in the paper"
    warmup_epochs = choose("warmup_epochs", min(10, epochs // 10) if warm_up else 0, why)
    choose("start_warmup", min(0.3, base_lr) if warmup_epochs else 0.0, "as in the paper")
