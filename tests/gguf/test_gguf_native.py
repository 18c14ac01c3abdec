"""The part of GgufFile's C++ interface that Python does not see: typed_access.cpp, under the sanitizers."""

import subprocess
from pathlib import Path

import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    T_F32,
    U8,
    U16,
    U32,
    U64,
    array,
    build,
    kv,
    raw_kv,
    tensor,
)
from sanitized import compile_sanitized

BIG_BYTES = 16 << 20


@pytest.mark.external
def test_typed_access_and_moves(tmp_path: Path) -> None:
    integers = {"u8": U8, "i8": I8, "u16": U16, "i16": I16, "u32": U32, "i32": I32, "u64": U64, "i64": I64}
    inf, nan = float("inf"), float("nan")
    kvs = [kv(name, type_id, 7) for name, type_id in integers.items()]
    kvs += [kv("u64.max", U64, 2**64 - 1), kv("u64.fits", U64, 2**32 - 1), kv("u64.over", U64, 2**32)]
    kvs += [kv("i8.negative", I8, -1), kv("i64.negative", I64, -1)]
    kvs += [kv("f32", F32, 0.5), kv("f32.nan", F32, nan), kv("f32.inf", F32, -inf)]
    kvs += [kv("f64", F64, 0.1), kv("f64.nan", F64, nan), kv("f64.inf", F64, inf), kv("f64.huge", F64, 3.5e38)]
    kvs += [kv("bool.true", BOOL, 1), kv("bool.false", BOOL, 0), kv("text", STRING, "a\0b")]
    kvs += [raw_kv("u8s", ARRAY, array(U8, [0, 255, 7])), raw_kv("i8s", ARRAY, array(I8, [1, -1]))]
    kvs += [raw_kv("f32s", ARRAY, array(F32, [0, 1, -2.5])), raw_kv("f64s", ARRAY, array(F64, [0.1, 2]))]
    kvs += [raw_kv("f32s.empty", ARRAY, array(F32, [])), raw_kv("f32s.nan", ARRAY, array(F32, [0, nan]))]
    kvs += [raw_kv("strings", ARRAY, array(STRING, ["", "x", "yy"]))]
    path = tmp_path / "typed.gguf"
    pattern = bytes(i % 251 for i in range(251 * 4096))
    data = (pattern * (BIG_BYTES // len(pattern) + 1))[:BIG_BYTES]
    path.write_bytes(build(kvs, [tensor("big", [BIG_BYTES // 4], T_F32, 0)], data))

    program = compile_sanitized(["tests/gguf/typed_access.cpp", "csrc/gguf/gguf_file.cpp"], tmp_path / "typed_access")
    run = subprocess.run([program, path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
