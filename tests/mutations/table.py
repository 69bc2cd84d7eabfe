"""Which test must notice which fault: the test of the tests.

Names are those of csrc/common/mutate.h (faults of C++) and of plugin.py (faults of Python). In the
CUDA kernels, on the emulator, they are switched on by the tests of CUDA.
"""

from __future__ import annotations

USERS = "tests/test_users.py::"
GRID = "tests/model/test_grid.py::"
PACKED = "tests/model/test_packed.py::"
ORACLE = "tests/model/test_against_transformers.py::"
OPS = "tests/ops/"

CPP: dict[str, list[str]] = {
    "cap_dropped": [
        USERS + "test_attention_scores_are_capped[27b]",
        USERS + "test_no_path_drops_the_cap[decode]",
        OPS + "test_attention.py::test_the_cap_is_there",
    ],
    "logits_cap_dropped": [
        USERS + "test_logits_are_capped_once",
        OPS + "test_softcap.py::test_infinities_become_the_cap_and_nan_stays",
    ],
    "window_off_by_one": [
        USERS + "test_the_window_counts_the_token_itself",
        OPS + "test_attention.py::test_window_counts_the_token_itself_on_a_ring",
    ],
    "norm_without_one": [
        USERS + "test_the_norm_multiplies_by_one_plus_weight",
        OPS + "test_rms_norm.py::test_weight_zero_is_the_plain_norm_because_of_the_one",
    ],
    "embed_unrounded": [
        USERS + "test_the_embeddings_scale_is_rounded_to_the_weights_dtype",
        OPS + "test_embed.py::test_the_scale_is_rounded_to_the_weights_dtype",
    ],
    "ring_slot_shifted": [
        USERS + "test_a_conversation_continues_from_the_past",
        OPS + "test_cache_write.py::test_position_p_goes_to_slot_p_modulo_the_capacity",
    ],
    "future_visible": [
        USERS + "test_the_future_is_not_visible[False]",
        USERS + "test_beyond_the_window_with_padding",
    ],
    "documents_ignored": [
        USERS + "test_packing_isolates_documents_in_training",
        OPS + "test_attention.py::test_documents_do_not_see_each_other",
    ],
}

PYTHON: dict[str, list[str]] = {
    "query_scale_of_head_dim": [
        USERS + "test_the_query_scale_is_the_configs_and_not_the_head_dims",
    ],
    "layer_parity_inverted": [
        USERS + "test_even_layers_slide_and_odd_layers_see_everything",
    ],
    "left_padding_takes_positions": [
        USERS + "test_beyond_the_window_with_padding",
        GRID + "test_uncached_forward[8-left]",
    ],
    "right_padding_is_visible": [
        GRID + "test_cropped_straight_after_the_prompt[8-right]",
    ],
    "documents_leak": [
        USERS + "test_packing_isolates_documents_in_training",
        PACKED + "test_packed_equals_each_document_alone[three-cu_seqlens]",
    ],
    "documents_forgotten_by_the_cache": [
        PACKED + "test_decoding_goes_on_in_the_last_document[cu_seqlens]",
    ],
    "rope_by_column": [
        USERS + "test_a_conversation_continues_from_the_past",
    ],
    "crop_does_not_roll_back": [
        USERS + "test_rolling_back_needs_no_reprocessing",
    ],
    "crop_ignores_the_margin": [
        GRID + "test_crop_beyond_the_margin_names_the_least_n_and_changes_nothing[100]",
    ],
    "crop_counts_from_the_length": [
        "tests/model/test_cache.py::"
        "test_crop_within_the_margin_twice_is_counted_from_the_highest_position",
    ],
    "long_chunks_overwrite_the_ring": [
        USERS + "test_a_conversation_continues_from_the_past",
        GRID + "test_short_caches_equal_uncached_up_to_their_last_slot[384]",
    ],
    "reorder_leaves_lengths": [
        "tests/model/test_cache.py::test_reorder_permutes_rows_and_their_lengths",
    ],
    "reset_keeps_lengths": [
        USERS + "test_a_reset_cache_is_as_good_as_new",
    ],
    "norms_swapped": [
        USERS + "test_logits_are_capped_once",
    ],
    "cap_missing_in_backward": [
        USERS + "test_the_cap_is_part_of_the_backward",
    ],
    "loss_not_shifted": [
        USERS + "test_the_loss_sees_capped_logits",
    ],
    "num_items_ignored": [
        PACKED + "test_gradients_are_the_sum_of_those_of_each_document[cu_seqlens]",
    ],
    "last_column_pooled": [
        USERS + "test_the_sequence_head_reads_the_last_token_that_is_no_padding",
    ],
    "greedy_takes_the_second_best": [
        "tests/model/test_generation.py::test_greedy_equals_a_loop_without_a_cache_when_the_ring_wraps",
    ],
    "drafts_unchecked": [
        "tests/model/test_assisted.py::test_samples_of_one_prompt",
        "tests/model/test_assisted.py::test_an_assistant_in_training_mode_drafts_without_dropout",
    ],
    "prefixes_not_compared": [
        "tests/model/test_prefix.py::test_a_text_that_was_edited_is_read_from_the_edit_on[11]",
    ],
    "replays_uncounted": [
        "tests/model/test_graph.py::test_the_host_counts_replays",
    ],
}

CUDA = ["tests/cuda/test_mutations.py", "tests/cuda/test_mutations_attention.py"]

ALL: dict[str, list[str]] = {**CPP, **PYTHON}
