"""launcher/client.py on the real host, and what the demo prints."""

import socket

import pytest
from density_guidance.launcher import demo
from density_guidance.launcher.client import Client, Progress, WorkflowError, WorkflowInterrupted, node_outputs

EMPTY_IMAGE = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}


def image_workflow(prefix: str, color: int = 0) -> dict:
    return {
        "1": {**EMPTY_IMAGE, "inputs": {**EMPTY_IMAGE["inputs"], "color": color}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def chain_workflow(length: int) -> dict:
    """Nodes that take a moment each, one after the other."""
    inputs = {"sharpen_radius": 31, "sigma": 5.0, "alpha": 0.1}
    nodes = {"0": {**EMPTY_IMAGE, "inputs": {**EMPTY_IMAGE["inputs"], "width": 512, "height": 512}}}
    for i in range(1, length):
        nodes[str(i)] = {"class_type": "ImageSharpen", "inputs": {"image": [str(i - 1), 0], **inputs}}
    return {**nodes, "end": {"class_type": "PreviewImage", "inputs": {"images": [str(length - 1), 0]}}}


def test_progress_and_images_come_back(server):
    seen = []
    workflow = image_workflow("progress")
    workflow["2"]["_meta"] = {"title": "Keep it"}
    entry = server.client.run(workflow, seen.append)

    assert [str(step) for step in seen][-1] == "Keep it"
    assert {step.node_id for step in seen} == {"1", "2"}
    assert entry["status"]["status_str"] == "success"
    assert server.saved_files(entry) == [server.output / "progress_00001_.png"]
    assert server.saved_files(entry)[0].is_file()
    assert node_outputs(entry, "SaveImage")[0]["images"][0]["filename"] == "progress_00001_.png"


def test_many_prompts_come_back_in_order(server):
    entries = server.client.queue_many(image_workflow(f"many-{i}", color=i) for i in range(5))
    assert [server.saved_files(entry)[0].name for entry in entries] == [f"many-{i}_00001_.png" for i in range(5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"1": {"class_type": "NoSuchNode", "inputs": {}}}, "NoSuchNode does not exist"),
        (
            {"2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}},
            r"node 2 \(SaveImage\): .*missing: filename_prefix",
        ),
        (
            {"1": {"class_type": "EmptyImage", "inputs": {**EMPTY_IMAGE["inputs"], "width": -1}}},
            r"node 1 \(EmptyImage\): .*width",
        ),
        ({"3": {"class_type": "PreviewImage", "inputs": {}}}, r"node 3 \(PreviewImage\): .*missing: images"),  # 2 would run
    ],
    ids=["unknown class", "missing input", "bad value", "one of two outputs"],
)
def test_refused_workflow_names_node_and_input(server, change, message):
    with pytest.raises(WorkflowError, match=f"(?s)refused the workflow.*{message}"):
        server.client.run({**image_workflow("refused"), **change})


def test_web_page_format_is_told_apart(server):
    with pytest.raises(ValueError, match="API format"):
        server.client.run({"nodes": [], "links": [], "version": 0.4})


def test_failing_node_is_named(server):
    workflow = image_workflow("../outside")  # the host refuses to save outside its output folder
    with pytest.raises(WorkflowError, match=r"node 2 \(SaveImage\) failed: Exception: .*outside the output folder") as failure:
        server.client.run(workflow)
    assert ", in save_images" in str(failure.value)  # its traceback


def test_interrupt_stops_the_run_and_the_server_goes_on(server):
    seen = []

    def interrupt(step: Progress):
        seen.append(step.node_id)
        if step.node_id == "1":
            server.client.interrupt()

    with pytest.raises(WorkflowInterrupted, match=r"node \d+ \(ImageSharpen\) was interrupted"):
        server.client.run(chain_workflow(100), interrupt)
    assert int(seen[-1]) < 20
    assert server.client.run(image_workflow("after"))["status"]["completed"]


def test_timeout_says_where_the_run_is(server):
    with pytest.raises(TimeoutError, match="not finished within 3 s: it is in ImageSharpen"):
        server.client.run(chain_workflow(101), timeout=3.0)
    server.client.interrupt()
    assert server.client.run(image_workflow("after_timeout"), timeout=20.0)["status"]["completed"]


def test_client_of_nothing_says_where_it_looked():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"does not answer at {url}"):
            Client(url).run(image_workflow("nobody"))


# ------------------------------------------------------------ what the demo prints


def test_table_has_a_row_for_each_level_and_the_mean_of_the_seeds():
    table = {
        "rows": [{"label": "q 0.05", "bits_per_dim": [3.0, 4.0]}, {"label": "q 0.95", "bits_per_dim": [-1.0, 10.25]}],
        "columns": ["seed 0", "seed 1"],
    }
    assert demo.table_text(table).splitlines() == [
        "bits per dimension  seed 0  seed 1   mean",
        "q 0.05               3.000   4.000  3.500",
        "q 0.95              -1.000  10.250  4.625",
    ]


def test_progress_is_a_line_for_each_node_and_quarter(capsys):
    steps = [Progress("1", "Load"), *(Progress("2", "Sample", step, 20) for step in range(1, 21)), Progress("3", "Save")]
    show = demo.progress_printer()
    for step in steps:
        show(step)
    shown = ["Load", "Sample, step 1/20", *(f"Sample, step {n}/20" for n in (5, 10, 15, 20)), "Save"]
    assert capsys.readouterr().out.splitlines() == [f"  {text}" for text in shown]
