"""What submit decides before any head is asked: what is shipped, what is refused."""

from pathlib import Path

import pytest
import yaml

from jobs.errors import UserError
from jobs.job_server import JobServer
from jobs.recipe import Recipe, load_recipe
from jobs.submit import RECIPE_FILE, shipped, submit_run

AGAIN = "capfilt submit pets.yaml"


def recipe(**changes):
    values = {
        "name": "pets",
        "root": "s3://bucket/pets",
        "sources": [{"name": "pets", "format": "cc3m", "paths": ["s3://bucket/lists/pets.tsv"]}],
    }
    return Recipe.model_validate(values | changes)


class NoServer:
    """Stands where a job server would; whoever asks it anything has come too far."""

    def attempts(self):
        raise AssertionError("the head was asked")


def test_what_is_shipped_is_our_code_and_the_recipe_and_nothing_else():
    with shipped(recipe()) as folder:
        assert {path.name for path in Path(folder).iterdir()} == {
            "model",
            "pipeline",
            "jobs",
            RECIPE_FILE,
        }
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        assert Path(folder, "jobs", "cli.py") in files
        assert not [path for path in files if "__pycache__" in path.parts or path.suffix == ".pyc"]
        assert not [path for path in files if path.name.startswith(".")]
        assert sum(path.stat().st_size for path in files) < 8_000_000
    assert not Path(folder).exists()


def test_the_recipe_that_is_shipped_is_the_resolved_one(tmp_path):
    path = tmp_path / "pets.yaml"
    path.write_text(yaml.safe_dump(recipe().model_dump(mode="json")))
    loaded = load_recipe(str(path), ["seed=7"])
    with shipped(loaded) as folder:
        assert load_recipe(str(Path(folder, RECIPE_FILE))) == loaded
        assert loaded.seed == 7


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"root": "corpus/pets"}, "root"),
        (
            {"sources": [{"name": "pets", "format": "cc3m", "paths": ["pets.tsv"]}]},
            "sources.pets.paths",
        ),
        (
            {
                "sources": [
                    {
                        "name": "pets",
                        "format": "coco",
                        "paths": ["/mnt/a.json"],
                        "image_root": "images",
                    }
                ]
            },
            "sources.pets.image_root",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_only_this_machine_can_see_are_refused(changes, key):
    with pytest.raises(UserError, match=f"(?s)^{key} = .*--set {key}="):
        submit_run(NoServer(), recipe(**changes), AGAIN)


def test_a_model_folder_that_only_this_machine_can_see_is_refused(tmp_path, monkeypatch):
    (tmp_path / "my-captioner").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^captioner.name = my-captioner: relative"):
        submit_run(NoServer(), recipe(captioner={"name": "my-captioner"}), AGAIN)
    with pytest.raises(AssertionError, match="the head was asked"):
        submit_run(NoServer(), recipe(captioner={"name": "owner/on-the-hub"}), AGAIN)


def test_no_head_is_a_line_that_says_what_to_do(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="ray dashboard ray_cluster.yaml.*capfilt status"):
        JobServer("http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_a_variable_that_would_override_the_address_is_named(monkeypatch, name):
    monkeypatch.setenv(name, "http://10.0.0.1:8265")
    with pytest.raises(UserError, match=f"^{name} is set to http://10.0.0.1:8265"):
        JobServer("http://127.0.0.1:8265")


def test_a_token_file_that_is_not_there_is_named(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH: .*token: No such file"):
        JobServer("http://127.0.0.1:9")
