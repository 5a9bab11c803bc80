"""Run tests of test_sinkhorn.py with the CUDA kernels, on the CPU:

    SINKHORN_EXT=torch PYTHONPATH=.:tests python tests/cuda_on_cpu/run.py LIBRARY

The library is what test_cuda_on_cpu.py builds from kernels.cpp. It has smaller blocks than on a GPU.
"""

import ctypes
import sys

import test_sinkhorn as tests
import torch

from sinkhorn_ext import sinkhorn

KIB = 1024
# Multiprocessors, compute capability, bytes of shared memory each, whether blocks can wait for each other, and which
# kind of launch that gives for a problem with rows enough: 0 one for each step, 1 cooperative, 2 clusters.
GPUS = {
    "clusters": (3, 9, 228 * KIB, True, 2),
    "one grid": (3, 8, 228 * KIB, True, 1),
    "one launch for each step": (3, 8, 228 * KIB, False, 0),
    "slabs larger than the shared memory": (2, 8, 40 * KIB, True, 1),
    "rows larger than the shared memory": (3, 8, 14 * KIB, True, 1),
}


def cases():
    float32, bfloat16 = torch.float32, torch.bfloat16
    for dtype in (float32, bfloat16, torch.float16):
        for nmb_images, nmb_prototypes in ((1, 17), (17, 1), (129, 17), (70, 600)):
            yield tests.test_error_is_at_most_twice_that_of_naive_torch, dtype, nmb_images, nmb_prototypes
    yield tests.test_error_is_at_most_twice_that_of_naive_torch, float32, 33, 3000
    yield tests.test_codes_are_finite_and_correct_for_small_epsilon_and_unnormalised_scores, 100, 0.01, float32
    yield (tests.test_codes_loss_and_gradient_are_finite_for_scores_up_to_1e6_epsilon,)
    yield tests.test_codes_are_float32_or_float64_and_rows_sum_to_one, bfloat16
    yield tests.test_scores_may_have_any_stride_and_are_not_modified, "every second column"
    yield tests.test_scores_may_have_any_stride_and_are_not_modified, "every third row"
    yield tests.test_one_nan_makes_all_codes_nan, (7, 5)
    yield tests.test_two_calls_give_the_same_bits, float32
    for iterations in (1, 2, 10):
        yield tests.test_codes_match_the_reference_for_any_number_of_iterations, iterations, float32, 3e-5
    for with_extra in (False, True):
        yield tests.test_masked_prototypes_and_images_take_no_part, with_extra, 0.01, float32, 3e-5
    yield tests.test_extra_rows_take_part_in_the_balance_and_get_no_codes, 50, float32, 3e-5
    yield tests.test_several_problems_at_once_are_independent, float32, 3e-5
    for nmb_prototypes, nmb_images, nmb_extra in ((17, 9, 6), (1500, 9, 6), (17, 0, 0)):
        test = tests.test_operators_for_several_processes_match_plain_torch_in_float64
        yield test, nmb_prototypes, nmb_images, nmb_extra
    yield tests.test_loss_and_gradient_match_the_reference, 8, (6, 0, 3), float32
    yield tests.test_loss_and_gradient_match_the_reference, 5, (1, 0), bfloat16
    yield tests.test_the_codes_of_assigning_scores_are_those_of_a_plain_formula, 17, 129, (0, 1), float32
    yield tests.test_masked_prototypes_get_no_gradient_and_do_not_change_the_loss, float32, 3e-5
    yield tests.test_a_nan_or_a_masked_image_makes_the_loss_and_its_gradient_nan, 0, (0, 1), -torch.inf
    yield (tests.test_loss_and_gradient_match_the_reference_for_unnormalised_scores,)
    yield tests.test_more_assigning_crops_than_a_batch_has_large_ones, float32, 3e-5
    yield tests.test_moments_are_sums_in_float64, (2, 17, 129), float32
    yield tests.test_moments_are_sums_in_float64, (2, 0, 5), bfloat16
    yield tests.test_codes_match_the_reference_for_any_number_of_iterations, 3, torch.float64, 1e-9  # in plain torch


def main(library):
    torch.set_num_threads(1)
    torch.ops.load_library(library)
    gpu = ctypes.CDLL(library)
    scores = tests.cosine_scores(70, 600)
    for name, (*settings, kind) in GPUS.items():
        gpu.set_device(*settings, 0)
        for test, *arguments in cases():
            try:
                test(*arguments, "cpu")
            except Exception as error:
                raise AssertionError(f"{name}: {test.__name__}{tuple(arguments)}: {error}") from error
        before = gpu.nmb_launches(kind)
        codes = sinkhorn(scores)
        launches = gpu.nmb_launches(kind) - before
        assert launches == (7 if kind == 0 else 1), f"{name}: {launches} launches"
        for seed in (1, 2):  # of the order in which threads run
            gpu.set_device(*settings, seed)
            assert torch.equal(sinkhorn(scores), codes), f"{name}: results depend on the order of threads"
    gpu.set_device(3, 0, 228 * KIB, True, 0)  # there is no code for a GPU of compute capability 0
    try:
        sinkhorn(scores)
    except RuntimeError as error:
        assert "not compiled for this GPU" in str(error)
    else:
        raise AssertionError("expected an error where the kernels were not compiled for the GPU")


if __name__ == "__main__":
    main(sys.argv[1])
