"""Children of a process that has used a GPU, and of one that has not: forks.py FILE. Prints what they say."""

import os
import sys

import fixmin_cpp


def in_child(what):
    pid = os.fork()
    if pid == 0:
        try:
            what()
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def load(device="cuda"):
    with fixmin_cpp.Model(sys.argv[1], device=device) as model:
        assert model.info["device"] == ("cpu" if device == "auto" else device), model.info["device"]
        answer(model)


def answer(model):
    model.generate([1, 2], max_new_tokens=3, ignore_eos=True)


fixmin_cpp.system_info()
fixmin_cpp.Model(sys.argv[1], device="cpu").close()
assert in_child(load) == 0
model = fixmin_cpp.Model(sys.argv[1], device="cuda")
answer(model)
assert in_child(lambda: answer(model)) == 3
assert in_child(lambda: model.close()) == 0
assert in_child(load) == 3
assert in_child(lambda: load("cpu")) == 0
assert in_child(lambda: load("auto")) == 0
answer(model)
model.close()
print("parent")
