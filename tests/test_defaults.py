"""defaults.py: the options that follow from the images."""

import pytest

import options
import train
from defaults import (
    ALIGNED,
    BETWEEN_CELLS,
    CROP_LISTS,
    DERIVED,
    MEAN_IMAGE,
    MIRROR_IMAGES,
    PLAIN_GROUND,
    derive,
    kind_of_images,
)

IMAGENET = dict(images=1_281_167, image_side=375)
SMALL = dict(images=1400, image_side=32, world_size=1, epochs=30)


def values(**given) -> dict[str, object]:
    return {name: value for name, (value, _) in derive(**given).items()}


@pytest.mark.parametrize(
    "recipe, world_size",
    [("100ep", 64), ("200ep", 64), ("400ep", 64), ("800ep", 64), ("200ep_bs256", 4), ("400ep_bs256", 4)]
    + [("400ep_2x224", 64), ("rn50w2", 64), ("rn50w4", 64)],
)
def test_on_imagenet_the_options_are_those_of_the_published_recipes(recipe, world_size):
    """Given only the batch, and the crops of a row with other crops, the rest follows."""
    args = train.parse_args([f"@{options.SHAPES_RECIPE.parent}/{recipe}.args"])
    given = {"batch_size": args.batch_size}
    if recipe == "400ep_2x224":
        given["nmb_crops"] = [2]
    derived = values(**IMAGENET, world_size=world_size, epochs=args.epochs, given=given)
    expected = {name: getattr(args, name) for name in derived}
    expected |= dict(
        blur_sigma=2.0, crops_for_assign=[0, 1], temperature=0.1, epsilon=0.05, relative_epsilon="off", stem="imagenet"
    )
    unset = {name for name, value in expected.items() if value is None}  # have no effect in this recipe
    assert unset <= {"epoch_queue_starts", "start_warmup"}
    assert {n: v for n, v in derived.items() if n not in unset} == {n: v for n, v in expected.items() if n not in unset}


def test_options_of_the_user_are_kept_and_the_rest_follows_them():
    given = dict(nmb_prototypes=3000, base_lr=0.5, size_crops=[96, 48], batch_size=16)
    derived = values(**SMALL, given=given)
    assert not given.keys() & derived.keys() and given.keys() | derived.keys() == set(DERIVED)
    assert derived["final_lr"] == 0.0005 and derived["stem"] == "imagenet"
    assert values(**SMALL, given={"epsilon": 0.05})["relative_epsilon"] == "off"
    assert values(**SMALL, given={"relative_epsilon": "off"})["epsilon"] == 0.05


@pytest.mark.parametrize("name, value", [*zip(CROP_LISTS, ([2], [32], [0.5], [0.9]), strict=True)])
def test_a_list_of_one_resolution_makes_all_lists_of_one(name, value):
    for image_set in (SMALL, SMALL | IMAGENET):
        derived = values(**image_set, given={name: value})
        assert all(len(derived[other]) == 1 for other in CROP_LISTS if other != name)


def test_small_sets_have_no_small_crops_unless_two_resolutions_are_given():
    sides = {side: values(**(SMALL | {"image_side": side}), given={})["size_crops"] for side in (28, 64, 120, 300)}
    assert sides == {28: [32], 64: [48], 120: [96], 300: [224]}
    two = values(**SMALL, given={"nmb_crops": [2, 4]})
    assert two["size_crops"] == [32, 16] and len(two["min_scale_crops"]) == len(two["max_scale_crops"]) == 2
    assert values(**SMALL, given={"nmb_crops": [2, 2, 2]})["size_crops"] == [32, 16]


@pytest.mark.parametrize("side, blur_sigma", [(28, 0.29), (64, 0.43), (120, 0.86), (300, 2), (500, 2)])
def test_blur_of_small_sets_is_the_published_share_of_the_crops_side(side, blur_sigma):
    assert values(**(SMALL | {"image_side": side}), given={})["blur_sigma"] == blur_sigma
    assert values(**(SMALL | {"image_side": side, "images": 8_000}), given={})["blur_sigma"] == blur_sigma
    assert values(**(SMALL | {"image_side": side, "images": 8_001}), given={})["blur_sigma"] == 2
    assert values(**(SMALL | {"image_side": side}), given={"size_crops": [224, 96]})["blur_sigma"] == 2


def test_small_sets_get_many_steps_few_prototypes_and_relative_epsilon():
    derived = values(**SMALL, given={})
    assert SMALL["images"] // derived["batch_size"] >= 40
    assert derived["nmb_prototypes"] == 30 and derived["queue_length"] == 0
    assert derived["relative_epsilon"] == "on" and derived["epsilon"] == 0.3
    assert derived["size_crops"] == [32] and derived["nmb_crops"] == [4]
    for images, nmb_prototypes in ((100, 30), (2500, 66), (5000, 187), (62_500, 662)):
        assert values(**(SMALL | {"images": images}), given={})["nmb_prototypes"] == nmb_prototypes
    two = values(**(SMALL | {"world_size": 2}), given={})
    assert two["batch_size"] == derived["batch_size"] // 2 and two["base_lr"] == derived["base_lr"]


@pytest.mark.parametrize(
    "images, image_side, world_size, batch_size",
    [(1400, 32, 1, 32), (1400, 32, 2, 16), (300, 32, 1, 16), (5000, 64, 1, 64), (10_000, 28, 1, 64)]
    + [(60_000, 28, 1, 256), (60_000, 28, 4, 64), (60_000, 300, 1, 64), (60_000, 300, 4, 64), (60_000, 300, 8, 32)],
)
def test_the_batch_grows_with_the_set_as_far_as_steps_and_memory_allow(images, image_side, world_size, batch_size):
    derived = values(images=images, image_side=image_side, world_size=world_size, epochs=30, given={})
    assert derived["batch_size"] == batch_size
    if world_size == 1:  # the given crops count, not the derived ones
        large = dict(images=images, image_side=image_side, world_size=1, epochs=30, given={"size_crops": [224]})
        assert values(**large)["batch_size"] == min(64, batch_size)


@pytest.mark.parametrize("images", [4, 40, 700, 60_000, 499_999])
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("image_side", [8, 28, 64, 300])
def test_train_accepts_the_options_of_every_size_of_set(images, world_size, image_side, capsys):
    if images < 2 * world_size:
        pytest.skip("too few images for that many processes")
    args = train.parse_args(["--dataset", "shapes"])
    for name, value in values(images=images, image_side=image_side, world_size=world_size, epochs=3, given={}).items():
        setattr(args, name, value)
    train.check_args(args, world_size)
    assert 2 <= args.batch_size <= images // world_size


def test_the_learning_rate_follows_the_batch_and_every_option_has_a_reason():
    by_batch = [values(**SMALL, given={"batch_size": b})["base_lr"] for b in (16, 64, 256, 4096)]
    assert by_batch[1] == pytest.approx(2 * by_batch[0]) and by_batch == sorted(by_batch) and by_batch[3] == 4.8
    assert values(**IMAGENET, world_size=1, epochs=9, given={"batch_size": 64})["base_lr"] == 0.15
    by_images = [
        values(**SMALL | {"images": images}, given={"batch_size": 256})["base_lr"]
        for images in (1400, 8000, 60_000, 499_999)
    ]
    assert by_images[:2] == [4.8, 4.8] and by_images[2] == pytest.approx(1.75, abs=0.01)
    assert by_images[3] == pytest.approx(0.6, abs=0.01)  # the published 0.6 for a batch of 256
    assert all(reason for _, reason in derive(**SMALL, given={}).values())


def test_small_sets_warm_up_for_a_tenth_of_the_run():
    warmups = {epochs: values(**SMALL | {"epochs": epochs}, given={})["warmup_epochs"] for epochs in (5, 12, 30, 400)}
    assert warmups == {5: 0, 12: 1, 30: 3, 400: 10}
    assert values(**SMALL, given={})["start_warmup"] == 0.3
    assert values(**SMALL, given={"base_lr": 0.1})["start_warmup"] == 0.1
    assert values(**SMALL, given={"warmup_epochs": 0})["start_warmup"] == 0


def test_large_sets_of_small_images_get_crops_of_their_size():
    large_set = dict(images=1_281_167, world_size=4, epochs=200, given={})
    assert values(**large_set, image_side=256)["size_crops"] == [224, 96]
    for side in (28, 64, 128):
        derived, smaller_set = (values(**large_set | {"images": n}, image_side=side) for n in (1_281_167, 60_000))
        assert [derived[name] for name in (*CROP_LISTS, "stem")] == [smaller_set[n] for n in (*CROP_LISTS, "stem")]
        assert derived["nmb_prototypes"] == 3000 and derived["base_lr"] == 0.6


def test_batchnorm_is_in_groups_of_8_processes_for_large_batches_as_published():
    cases = (64, 64), (4, 64), (8, 256), (12, 256)
    large = [values(**IMAGENET, world_size=w, epochs=99, given={"batch_size": b})["sync_bn"] for w, b in cases]
    assert large == ["apex", "pytorch", "apex", "pytorch"]
    assert values(**SMALL | {"world_size": 8}, given={})["sync_bn"] == "pytorch"


def test_queue_start_and_freeze_take_at_most_a_tenth_of_a_short_run():
    short = values(**IMAGENET, world_size=4, epochs=10, given={})
    assert short["queue_length"] == 3840 and short["epoch_queue_starts"] == 1
    assert values(**IMAGENET, world_size=4, epochs=1, given={})["freeze_prototypes_niters"] == 500
    assert values(**SMALL, given={"queue_length": 640})["epoch_queue_starts"] == 3


@pytest.mark.parametrize(
    "given, assigning",
    [
        ({}, [0, 1, 2, 3]),  # four crops of one size
        ({"nmb_crops": [2, 4]}, [0, 1]),
        ({"nmb_crops": [3, 2]}, [0, 1, 2]),
        ({"nmb_crops": [1, 5]}, [0, 1]),  # at least two, as a crop predicts the code of another
    ],
)
def test_all_large_crops_of_small_sets_get_codes(given, assigning):
    assert values(**SMALL, given=given)["crops_for_assign"] == assigning
    assert values(**SMALL | {"images": 500_000}, given=given)["crops_for_assign"] == [0, 1]


PHOTOGRAPHS = dict(plain_ground=0.14, mean_image=0.02, between_cells=0.5, mirror_images=0.5)
OTHERS = {
    "objects on a plain ground": PHOTOGRAPHS | {"plain_ground": 0.4},
    "aligned objects": PHOTOGRAPHS | {"mean_image": 0.3},
    "textures": PHOTOGRAPHS | {"between_cells": 0.2},
}


def test_photographs_get_the_papers_small_crops_and_half_its_jitter():
    derived = derive(**SMALL, given={}, described=PHOTOGRAPHS)
    assert derived["min_scale_crops"][0] == [0.14] and derived["color_strength"][0] == 0.5
    assert all("photographs" in derived[name][1] for name in ("min_scale_crops", "color_strength"))
    two = values(**SMALL, given={"nmb_crops": [2, 4]}, described=PHOTOGRAPHS)
    assert (
        two["min_scale_crops"] == [0.14, 0.05] and two["max_scale_crops"] == [1, 0.14] and len(two["size_crops"]) == 2
    )
    unchanged = values(**SMALL, given={}) | {"min_scale_crops": [0.14], "color_strength": 0.5}
    assert values(**SMALL, given={}, described=PHOTOGRAPHS) == unchanged


@pytest.mark.parametrize("kind, described", OTHERS.items())
def test_other_images_get_milder_crops_and_the_papers_jitter(kind, described):
    derived = derive(**SMALL, given={}, described=described)
    assert kind_of_images(described) == kind and kind in derived["min_scale_crops"][1]
    assert {name: value for name, (value, _) in derived.items()} == values(**SMALL, given={})
    assert derived["min_scale_crops"][0] == [0.4] and derived["color_strength"][0] == 1


@pytest.mark.parametrize("kind, described", OTHERS.items())
def test_aligned_objects_that_face_one_way_are_not_mirrored(kind, described):
    one_way = described | {"mean_image": ALIGNED, "mirror_images": MIRROR_IMAGES}
    derived = derive(**SMALL, given={}, described=one_way)
    value, reason = derived.pop("hflip")
    assert value == 0 and "face one way" in reason
    for name in ("mean_image", "mirror_images"):
        others = derive(**SMALL, given={}, described=one_way | {name: one_way[name] - 0.001})
        assert others.pop("hflip") == (0.5, "as in the paper") and others == derived


def test_kinds_change_at_their_thresholds():
    assert kind_of_images(PHOTOGRAPHS) == "photographs"
    assert kind_of_images(PHOTOGRAPHS | {"plain_ground": PLAIN_GROUND - 0.001}) == "photographs"
    assert kind_of_images(PHOTOGRAPHS | {"plain_ground": PLAIN_GROUND}) == "objects on a plain ground"
    assert kind_of_images(PHOTOGRAPHS | {"mean_image": MEAN_IMAGE}) == "aligned objects"
    assert kind_of_images(PHOTOGRAPHS | {"between_cells": BETWEEN_CELLS}) == "photographs"
    assert kind_of_images(PHOTOGRAPHS | {"between_cells": BETWEEN_CELLS - 0.001}) == "textures"


def test_what_images_show_changes_nothing_that_the_user_sets_and_nothing_for_large_sets():
    given = dict(min_scale_crops=[0.3], color_strength=0.8)
    assert not given.keys() & values(**SMALL, given=given, described=PHOTOGRAPHS).keys()
    assert values(**SMALL, given={"min_scale_crops": [0.3]}, described=PHOTOGRAPHS)["color_strength"] == 0.5
    assert values(**SMALL, given={"color_strength": 0.8}, described=PHOTOGRAPHS)["min_scale_crops"] == [0.14]
    letters = OTHERS["aligned objects"] | {"mirror_images": 0.9}
    assert "hflip" not in values(**SMALL, given={"hflip": 0.5}, described=letters)
    for side in (64, 375):
        large = SMALL | dict(images=1_281_167, image_side=side, epochs=200)
        for described in (PHOTOGRAPHS, letters):
            assert derive(**large, given={}, described=described) == derive(**large, given={})


def test_a_start_from_weights_changes_no_value_and_says_so():
    assert values(**SMALL, given={}, init=True) == values(**SMALL, given={})
    (_, reason), (_, usual) = (derive(**SMALL, given={}, init=init)["base_lr"] for init in (True, False))
    assert reason == usual + "; lower ones were worse with --init too"
    assert derive(**IMAGENET, world_size=4, epochs=200, given={}, init=True)["base_lr"][1].startswith("the paper's 0.6")
