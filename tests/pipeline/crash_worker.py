"""A process that runs jobs in forked children, which tests kill: a new Python starts too slowly.

Each line on stdin is `ROOT NUM_SHARDS AT`, with AT the number of the file operation at which
the child kills itself (0: never). Answers with one line when the child has begun, its process id,
and one when it has ended, its wait status.
"""

import os
import signal
import sys

import corpora

from pipeline.corpus import Corpus

MAX_SHARDS = 6
FILE_EVENTS = {
    "open",
    "os.link",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
}


def die_at(operation, root):
    """Kill this process when it is about to perform its n-th file operation under the root."""
    left = operation

    def hook(event, args):
        nonlocal left
        if event in FILE_EVENTS and any(root in str(arg) for arg in args):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def build(root, num_shards, at):
    corpus = Corpus(root)
    if at:
        die_at(at, root)
    corpora.build(corpus, num_shards)


def say(number):
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def serve():
    corpora.prepare(MAX_SHARDS)
    for line in sys.stdin:
        root, num_shards, at = line.split()
        child = os.fork()
        if not child:
            try:
                build(root, int(num_shards), int(at))
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        say(child)
        say(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    serve()
