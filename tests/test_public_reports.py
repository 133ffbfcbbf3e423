"""Public reports about similar systems, and the test that each became here.

Inputs are ours; a test's docstring names its report. Add a row with the test.
"""

import ast
import pathlib

import pytest

TESTS = pathlib.Path(__file__).parent
REPORTS = {
    # A second BOS in the middle of a conversation.
    "llama.cpp#9606": (
        "sparda_jax/engine/test_requests.py",
        "test_no_bos_in_the_middle_of_a_conversation",
    ),
    # A stored head is dropped where the file says that embeddings are tied.
    "vllm#51063": (
        "sparda_jax/checkpoint/test_hf.py",
        "test_a_stored_head_that_differs_is_kept_whatever_the_file_says",
    ),
    # rope_scaling and rope_parameters beside one another.
    "sglang#26187": ("sparda_jax/checkpoint/test_hf_config.py", "test_rope"),
    # Generation runs past a token that ends a turn.
    "tt-inference-server#3452": (
        "sparda_jax/checkpoint/test_end_tokens.py",
        "test_the_model_of_a_file_ends_with_them",
    ),
    # A template's own variables cannot be passed.
    "lmdeploy#3511": (
        "sparda_jax/engine/test_chat.py",
        "test_a_variable_turns_thinking_off",
    ),
    # Names of control tokens in a message become control tokens.
    "transformers#29279": (
        "sparda_jax/engine/test_chat.py",
        "test_a_document_writes_no_control_tokens",
    ),
    # A stop string ends the whole batch.
    "transformers#26959": (
        "sparda_jax/engine/test_stop_strings.py",
        "test_stop_strings_end_their_rows",
    ),
    # Many questions on one prefill.
    "kvpress#170": (
        "sparda_jax/engine/test_fork.py",
        "test_many_questions_on_one_prefill",
    ),
}


@pytest.mark.parametrize("report", REPORTS)
def test_the_reports_test_is_there_and_names_it(report):
    file, name = REPORTS[report]
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    found = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == name]
    assert len(found) == 1
    assert report in (ast.get_docstring(found[0]) or "")
