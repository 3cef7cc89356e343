"""README holds: its commands run, its recipes load, its links lead somewhere, its tree is the tree.

Every command line of a block of shell is executed, in the order in which it stands there, in a
folder that holds what it names in small: recipes, lists, a bucket, a web. What cannot be run in a
test stands in `INSTEAD`, with what is checked in its place.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer
from ray.scripts.scripts import cli as ray_cli
from stand_ins import FILES, Web, pictures, write_lists

import jobs.cli
from jobs.cluster_file import load_cluster_file
from jobs.errors import UserError
from jobs.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RECIPES = ROOT / "jobs" / "recipes"
SHIPPED = ("cc3m", "blip-14m", "blip2-129m")
BUCKETS = ("my-bucket",)
ROWS = 12  # of each list
SECONDS = 120  # for one command
MINIMAL = {"name": "minimal", "root": "corpus"}
SOURCE = {"name": "web", "format": "cc3m", "paths": ["cc3m.tsv"]}


def blocks(*languages):
    """The contents of README's fenced blocks in these languages."""
    pattern = rf"^```({'|'.join(languages)})\n(.*?)^```$"
    return [text for _, text in re.findall(pattern, README, re.MULTILINE | re.DOTALL)]


def command_lines(text):
    """The commands of a block of shell: continued lines joined, prompts and comments taken off."""
    is_session = any(line.startswith("$ ") for line in text.splitlines())
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if is_session and not line.startswith("$ "):
            continue  # what was printed
        command = re.sub(r"(^|\s)#.*$", "", line.removeprefix("$ ")).strip()
        if command:
            yield command


COMMANDS = [
    line for block in blocks("sh", "bash", "console", "shell") for line in command_lines(block)
]
INLINE = sorted({text for text in re.findall(r"`(capfilt [^`]*)`", README)})


# --- what cannot be run here ----------------------------------------------------------------------


def is_a_target(command, world):
    """`make X ARGS=...`: X is a target, and what it runs takes the arguments."""
    target, *others = shlex.split(command)[1:]
    targets = dict(
        re.findall(
            r"^([a-z]+):[^=\n]*\n(?:ifdef ARGS\n)?\t@?(.*)", (ROOT / "Makefile").read_text(), re.M
        )
    )
    assert target in targets, f"{command}: the Makefile has no such target"
    for each in others:
        name, _, value = each.partition("=")
        assert f"$({name})" in targets[target], f"{command}: {target} takes no {name}"
        if target == "demo":
            parse(["demo", *shlex.split(value)])


def parses(command, world):
    """A command of ours that needs models or a cluster: known, with options that it has."""
    name, *arguments = plain(command)[1:]
    parse([name, *arguments])


def parses_and_loads(command, world):
    """The same, of a recipe that is shipped: with its options it loads, and its lists are cut."""
    parses(command, world)
    name, recipe, *others = plain(command)[1:]
    sets = [value for flag, value in zip(others, others[1:], strict=False) if flag == "--set"]
    load_recipe(str(world.folder / recipe), sets, is_rehearsal="--rehearsal" in others)


def parses_as_ray(command, world):
    """`ray up` and the like: Ray has the command, and the cluster file is one."""
    name, *arguments = plain(command)[1:]
    ray_cli.commands[name].make_context(name, list(arguments))  # which empties it
    for each in arguments:
        if each.endswith(".yaml"):
            load_cluster_file(str(world.folder / each))


def plain(command):
    """The words of a command up to where its output goes."""
    return shlex.split(re.split(r"\s[>|]", command)[0])


def parse(words):
    """Have a command of ours read its options without running it, and fail for a wrong one."""
    with pytest.raises(SystemExit) as ended:
        jobs.cli.main([*words, "--help"])  # options are read before help is given
    assert ended.value.code == 0, f"capfilt {shlex.join(words)}: no such command or option"


_SHIPPED = rf"({'|'.join(SHIPPED)})\.yaml"
INSTEAD: dict[str, Callable] = {
    r"make \w+": is_a_target,
    # tests/test_end_to_end.py runs the demo.
    r"capfilt demo\b": parses,
    # tests/jobs/test_ray_cluster.py and test_submit_to_a_head.py start heads and hand runs over.
    r"ray (up|down|dashboard|status|attach|submit)\b": parses_as_ray,
    r"capfilt submit\b": parses_and_loads,
    r"capfilt (logs|stop|list)\b": parses,
    # Models of the hub; tests/jobs/test_whole.py does all of it with small ones.
    rf"capfilt (run|score|select|pretrain|evaluate|ablate) {_SHIPPED}(?!.*--dry-run)": (
        parses_and_loads
    ),
    r"capfilt (pretrain|evaluate|ablate|calibrate|export)\b": parses,
}


def stand_in(command):
    """What is checked in place of a command, or None: it is run."""
    found = [check for pattern, check in INSTEAD.items() if re.match(pattern, command)]
    return found[0] if found else None


# --- the world that commands are run in -----------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A folder with all that README's commands name, and the environment that they see."""

    folder: Path
    environment: dict[str, str]

    def run(self, command):
        return subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    here = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "HOME": str(folder / "home"),
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    for bucket in BUCKETS:
        store = boto3.client(
            "s3",
            endpoint_url=here["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        store.create_bucket(Bucket=bucket)
    with pictures() as web:
        lay_out(folder, web)
        yield World(folder, os.environ | keys | here)
    moto.stop()


def lay_out(folder, web: Web):
    """Write the recipes that README shows and ships, with lists that fit them."""
    (folder / "home").mkdir()
    (folder / "bin").mkdir()
    program = folder / "bin" / "capfilt"  # this checkout's, whatever is installed
    program.write_text(f"#!{sys.executable}\nfrom jobs.cli import main\n\nmain()\n")
    program.chmod(0o755)
    shutil.copy(ROOT / "ray_cluster.yaml", folder)
    urls = [web.url(f"/{number}.jpg") for number in range(ROWS)]
    write_lists(folder, urls)
    shown = [yaml.safe_load(text) for text in blocks("yaml")]
    for recipe in shown:
        if {"name", "sources"} <= recipe.keys():
            write(folder, recipe, web, urls)
    for name in SHIPPED:
        write(folder, yaml.safe_load((RECIPES / f"{name}.yaml").read_text()), web, urls)


def write(folder, recipe, web, urls):
    """Write a recipe that may call the web on loopback, and the lists that it names."""
    here = {"allowed_networks": ["127.0.0.1/32"], "allowed_ports": [web.port]}
    recipe = recipe | {"fetch": recipe.get("fetch", {}) | here}
    for source in recipe["sources"]:
        if source["name"] in FILES:
            source["paths"] = [FILES[source["name"]]]
        else:
            write_table(folder, source, urls)
    (folder / f"{recipe['name']}.yaml").write_text(yaml.safe_dump(recipe))


def write_table(folder, source, urls):
    """Write a CSV of a source's own columns where it looks for it."""
    assert source["format"] == "table", f"README has a source of {source['format']}: give it a list"
    name = source["paths"][0].replace("*", "part-0").removesuffix(".gz")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f"{source.get('url_column', 'url')},{source.get('caption_column', 'caption')}\n"
    path.write_text(header + "".join(f"{url},a picture\n" for url in urls))
    if source["paths"][0].endswith(".gz"):
        subprocess.run(["gzip", str(path)], check=True)


# --- commands -------------------------------------------------------------------------------------


def test_readme_has_commands_and_most_of_ours_are_run():
    assert len(COMMANDS) >= 10
    run = [each for each in COMMANDS if stand_in(each) is None]
    assert len(run) >= 6
    assert any(each.startswith("capfilt run ") for each in run)


def test_every_command_of_readme_runs_or_has_a_check_instead(world):
    """In order, for one makes what the next one reads."""
    for command in COMMANDS:
        check = stand_in(command)
        if check is not None:
            check(command, world)
            continue
        done = world.run(command)
        assert done.returncode == 0, (
            f"README says: {command}\nit ends with {done.returncode}:\n{done.stdout[-2000:]}\n"
            f"{done.stderr[-2000:]}\nmend it, or give it a check in INSTEAD"
        )
        if command.startswith("capfilt run ") and "done, 0 of them now" not in done.stdout:
            assert "--dry-run" in command or f"{ROWS} images in" in done.stdout, done.stdout


@pytest.mark.parametrize("command", INLINE)
def test_every_command_within_a_sentence_is_one(command):
    parse(plain(command)[1:])


@pytest.mark.parametrize(
    "command",
    [
        "capfilt pretend cc3m.yaml",
        "capfilt submit cc3m.yaml --adress head",
        "capfilt submit cc3m.yaml --set download.num_thread=3",
        "capfilt run cc3m.yaml --rehearsals",
        "make demonstration",
        "make demo ARGS=--quickly",
        "make lint ARGS=--quick",
        "ray upp ray_cluster.yaml",
        "ray up no_such_file.yaml",
        "no-such-program",
        "capfilt run pets.yaml --set download.no_such_key=1",
    ],
)
def test_a_wrong_command_would_be_found(command, world):
    check = stand_in(command)
    if check is None:
        assert world.run(command).returncode != 0
        return
    with pytest.raises((AssertionError, UserError)):
        check(command, world)


# --- recipes, links, the tree ---------------------------------------------------------------------


@pytest.mark.parametrize("text", blocks("yaml"), ids=lambda text: text.split("\n")[0][:40])
def test_every_recipe_and_part_of_one_loads(text, tmp_path):
    part = yaml.safe_load(text)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"sources": [SOURCE]} | part))
    assert load_recipe(str(path)).root


def anchors():
    """The anchors that GitHub gives README's headings."""
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_lead_to_files_and_headings_that_exist():
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    known = set(anchors())
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / path).exists(), f"README links to {target}"
        assert not anchor or path or anchor in known, f"README links to {target}"


def test_files_that_sentences_name_are_there():
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`((?:model|pipeline|jobs|tests)/[\w./-]+)`", text)
    assert named
    for path in named:
        assert (ROOT / path).exists(), f"README names {path}"


def test_folders_and_files_of_the_tree_are_there():
    block = README.split("## The tree")[1].split("```")[1]
    folders: list[str] = []
    for line in block.strip("\n").splitlines():
        name = line.split()[0]
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        assert Path(ROOT, *folders, name).exists(), line
        if name.endswith("/"):
            folders.append(name)
    shown = {line.split()[0] for line in block.splitlines() if line and not line.startswith(" ")}
    assert shown >= {"model/", "pipeline/", "jobs/", "tests/"}
