"""The thirty trials: what each injects, and which tests stand for it; slow ones are run by `make trials`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

# number: (what is injected, "file: test" each; or why nothing stands for it)
TRIALS: dict[int, tuple[str, tuple[str, ...] | str]] = {
    1: ("a train worker is killed", ("test_train_ray: test_a_killed_driver_and_a_killed_worker_leave_the_loss_curve",)),
    2: ("a worker dies at every attempt", ("trials/test_trainings: test_a_worker_that_dies_at_every_attempt_ends_the_run",)),
    3: ("the driver is killed", (
        "test_train_ray: test_a_killed_driver_and_a_killed_worker_leave_the_loss_curve",
        "test_termination: test_folders_of_dead_drivers_are_swept_and_no_others",
        "test_termination: test_what_a_killed_driver_started_ends_with_it_and_nothing_else",
        "trials/test_drivers: test_nothing_outlives_a_killed_driver_by_ten_seconds",
    )),
    4: ("training's controller, which is the driver, or a helper of Ray's is killed", (
        "test_train_ray: test_a_killed_driver_and_a_killed_worker_leave_the_loss_curve",
        "trials/test_trainings: test_a_killed_helper_of_rays_costs_nothing",
    )),
    5: ("a raylet is killed", (
        "trials/test_hosts: test_a_lost_host_costs_its_batch", "trials/test_hosts: test_a_training_goes_on_without_a_lost_host",
        "trials/test_elastic: test_two_workers_then_one_then_two",
    )),
    6: ("a raylet is frozen and wakes", (
        "test_lease: test_a_process_frozen_beyond_its_lease_is_shut_out_when_it_wakes",
        "trials/test_hosts: test_a_frozen_host_is_done_without_and_may_wake",
        "trials/test_hosts: test_a_training_goes_on_without_a_frozen_host_that_wakes",
    )),
    7: ("the head's control store is killed", (
        "trials/test_hosts: test_a_lost_head_ends_the_run_and_another_cluster_goes_on",
        "trials/test_hosts: test_a_training_whose_head_is_lost_ends_and_goes_on_elsewhere",
    )),
    8: ("a job's supervisor is killed, the job is sent again", (
        "test_submit: test_ids_say_run_and_attempt_and_are_unique",
        "trials/test_drivers: test_a_job_whose_supervisor_is_killed_fails_and_is_resumed",
    )),
    9: ("the driver of a tuning is killed", (
        "test_tune: test_a_tuning_that_was_interrupted_repeats_nothing",
        "test_termination: test_folders_of_dead_drivers_are_swept_and_no_others",
    )),
    10: ("calls fail and workers are killed while answering", (
        "test_sweep: test_a_killed_worker_costs_one_batch",
        "trials/test_hosts: test_workers_killed_every_few_seconds_while_calls_fail",
    )),
    11: ("SIGTERM with ten seconds of grace", (
        "test_termination: test_training_saves_where_it_is_and_goes_on_from_there",
        "trials/test_trainings: test_a_training_that_is_asked_to_end_saves_and_goes_on",
        "trials/test_trainings: test_an_interrupted_training_leaves_nothing_at_work",
        "trials/test_drivers: test_a_sweep_that_is_asked_to_end_does_so",
    )),
    12: ("a worker sleeps for ever, is frozen, or skips a report", (
        "test_termination: test_a_frozen_worker_is_named_within_a_minute",
        "test_termination: test_a_worker_asleep_is_named_and_not_those_that_wait_for_it",
        "test_termination: test_of_workers_that_wait_for_each_other_the_odd_one_is_named",
        "trials/test_trainings: test_a_frozen_worker_is_named_and_the_group_starts_again",
    )),
    13: ("another cluster is on the host", (
        "test_sweep: test_an_address_in_the_shell_is_not_obeyed", "test_submit: test_a_port_of_another_program_is_named_at_once",
        "trials/test_drivers: test_strangers_on_rays_ports_are_left_alone",
    )),
    14: ("the disk is full", (
        "test_store: test_a_full_disk_names_the_blob_and_hurts_nothing", "test_own_files: test_a_full_disk_leaves_no_stub",
        "test_disks: test_training_on_a_disk_that_fills_up_stops_with_a_sentence_and_goes_on_with_more",
    )),
    15: ("killed at random points of a commit", (
        "test_store: test_killed_at_a_random_moment", "test_store: test_stopped_at_any_write_the_reader_sees_old_or_new",
    )),
    16: ("parts cut short, empty, foreign", (
        "test_store: test_damaged_blobs_are_put_aside_named_and_done_again",
        "test_store: test_foreign_blobs_are_put_aside_or_ignored",
    )),
    17: ("one bit flipped", (
        "test_store: test_every_flipped_bit_is_found", "test_own_files: test_every_flipped_bit_of_the_step_log_is_seen",
        "test_own_files: test_a_manifest_with_another_row_count_than_its_part_is_damaged",
    )),
    18: ("two runs of one name, a stale lock", (
        "test_own_job: test_a_held_name_is_refused_before_torch_is_imported",
        "test_lease: test_a_lost_host_is_taken_over_after_its_lease", "test_lease: test_a_lock_removed_by_hand_shuts_its_owner_out",
        "test_object_stores: test_two_writers_one_killed_and_one_that_takes_over",
    )),
    19: ("a broken snapshot of Ray's: none is kept", (
        "test_train_ray: test_a_killed_driver_and_a_killed_worker_leave_the_loss_curve",
    )),
    20: ("a damaged or hostile scorer", (
        "test_own_files: test_a_hostile_configuration_is_refused_before_anything_is_allocated",
        "test_own_files: test_weights_that_cannot_be_right_are_refused",
        "test_learned: test_damaged_or_foreign_weights_are_refused_with_file_and_reason",
    )),
    21: ("other columns", ("test_store: test_other_columns_are_refused_by_name",)),
    22: ("a loss that is not finite", (
        "test_train: test_a_step_that_is_not_finite_is_skipped",
        "test_train: test_a_loss_that_stays_bad_ends_it_and_keeps_the_last_good_state",
    )),
    23: ("broken rows and pictures", (
        "test_data: test_too_many_broken_rows_stop_the_run_and_name_the_first",
        "test_images: test_a_bad_picture_is_refused_in_one_sentence",
        "test_own_files: test_a_png_with_a_long_comment_is_sound_and_a_huge_picture_is_not",
    )),
    24: ("settings out of all ranges", (
        "test_own_job: test_values_out_of_all_ranges_end_with_2_and_one_sentence",
        "test_cli: test_mistakes_end_with_2_and_one_sentence_before_ray_starts",
    )),
    25: ("names that lead elsewhere", (
        "test_store: test_unsafe_run_names_are_refused", "test_own_job: test_every_command_refuses_what_no_file_has",
    )),
    26: ("hostile answers", ("test_report: test_hostile_text_is_inert_everywhere",)),
    27: ("impossible targets, scores that are NaN", (
        "test_tune: test_a_target_beyond_the_floor_is_unreachable_and_says_what_is_best",
        "test_own_job: test_nan_scores_are_refused_whatever_the_budget",
    )),
    28: ("no token, an empty one, an open one; secrets", (
        "test_own_files: test_a_home_that_cannot_be_written_says_what_helps",
        "test_submit: test_a_token_file_that_is_open_is_closed",
        "test_object_stores: test_a_run_reports_from_a_bucket_into_it_and_leaves_no_secret",
    )),
    29: ("a million rows", (
        "test_scale: test_coded_rows_take_a_fraction_of_the_memory", "test_scale: test_a_page_does_not_grow_with_its_rows",
    )),
    30: ("a changed scorer, model, prompt or code under the same name", (
        "test_source: test_a_changed_prompt_makes_answers_stale",
        "test_grading: test_a_changed_grader_grades_again_without_the_model",
        "test_source: test_a_flipped_sign_makes_a_methods_cells_new_and_no_others",
        "test_identity: test_other_weights_in_the_same_place_are_another_question_and_refused",
    )),
}  # fmt: skip


def test_there_are_thirty() -> None:
    assert sorted(TRIALS) == list(range(1, 31))


@pytest.mark.parametrize("number", TRIALS)
def test_what_stands_for_a_trial_is_there(number: int) -> None:
    _, tests = TRIALS[number]
    if isinstance(tests, str):
        pytest.skip(f"trial {number}: {tests}")
    for one in tests:
        file, _, name = one.partition(": ")
        tree = ast.parse((TESTS / f"{file}.py").read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, one
