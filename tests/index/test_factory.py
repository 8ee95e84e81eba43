"""Factory strings: what is taken, what is refused with which advice."""

import subprocess
import sys

import faiss
import numpy as np
import pytest

from bge_ray.errors import IndexBuildError, InstallationError
from bge_ray.index.factory import Kind, Metric, check_factory, choose_nlist, index_bytes
from bge_ray.index.package import check_distributions


@pytest.mark.parametrize(
    ("factory", "full", "kind", "nlist", "code_size"),
    [
        ("Flat", "IDMap2,Flat", Kind.FLAT, 1, 128),
        ("IDMap,SQ8", "IDMap2,SQ8", Kind.FLAT, 1, 32),
        ("IDMap2,SQfp16", "IDMap2,SQfp16", Kind.FLAT, 1, 64),
        ("IVF1k,Flat", "IVF1k,Flat", Kind.IVF, 1024, 128),
        ("IVF64,PQ8x4", "IVF64,PQ8x4", Kind.IVF, 64, 4),
        ("RR,IVF64,RaBitQ", "RR32,IVF64,RaBitQ", Kind.IVF, 64, 12),
        ("OPQ8_32,IVF64,PQ8", "OPQ8_32,IVF64,PQ8", Kind.IVF, 64, 8),
        ("IVF64_HNSW32,SQ8", "IVF64_HNSW32,SQ8", Kind.IVF, 64, 32),
        ("HNSW16", "IDMap2,HNSW16", Kind.SHARDS, 1, 128 + 144),
        ("HNSW16_SQ8", "IDMap2,HNSW16,SQ8", Kind.SHARDS, 1, 32 + 144),
    ],
)
def test_supported(factory, full, kind, nlist, code_size):
    spec = check_factory(factory, 32, Metric.L2)
    assert spec.kind is kind
    assert (spec.nlist, spec.code_size) == (nlist, code_size)
    assert spec.factory.replace(f"IVF{nlist},", "IVF1k,") == full.replace(f"IVF{nlist},", "IVF1k,")
    assert check_factory(spec.factory, 32, Metric.L2) == spec
    assert faiss.index_factory(32, spec.factory).d == 32


@pytest.mark.parametrize(
    ("factory", "advice"),
    [
        ("IVF64,PQ8x4fs", "without 'fs'"),
        ("IVF64,PQ8x4fsr", "without 'fs'"),
        ("IVF64,PQ8x4fs_64", "without 'fs'"),
        ("IVF64,RaBitQfs", "without 'fs'"),
        ("PQ8x4fs,RFlat", "without 'fs'"),
        ("IVF64,FlatPanorama8", "IVF...,Flat"),
        ("IVF64,SQ8,RFlat", "re-rank"),
        ("IVF64,PQ8,Refine(SQfp16)", "re-rank"),
        ("IDMap2,IVF64,SQ8", "leave IDMap out"),
        ("IDMap,IVF64,SQ8", "leave IDMap out"),
        ("NSG32", "HNSW32"),
        ("IVF64,PQ16+16", "IVFPQR"),
        ("IVF64,FlatDedup", "IVF...,Flat"),
        ("IMI2x8,Flat", "IVF..."),
        ("L2norm,IVF64,Flat", "leave L2norm out"),
        ("PCAR16,IVF64,SQ8", "no inner products"),
        ("PCA16,Flat", "no inner products"),
        ("RR16,IVF64,SQ8", "keep 32 dimensions"),
        ("OPQ8_16,IVF64,PQ8", "keep 32 dimensions"),
        ("OPQ8,IVF64,SQ8", "OPQ helps PQ only"),
        ("PQ8", "IVF...,"),
        ("RaBitQ", "IVF...,"),
        ("IVF64", "codec is missing"),
        ("IVF0,SQ8", "must be 1 to"),
        ("IVF2M,SQ8", "must be 1 to"),
        ("IVF64,PQ7", "not possible with dim 32"),
        ("IVF64,PQ8x16", "not supported"),
        ("IVF64,SQ8_direct", "not supported"),
        ("LSH", "not supported"),
        ("", "not supported"),
        (" IVF64,SQ8", "not supported"),
    ],
)
def test_refused_with_advice(factory, advice):
    with pytest.raises(IndexBuildError) as refusal:
        check_factory(factory, 32, Metric.L2)
    assert advice in str(refusal.value)


def test_training_rows():
    assert check_factory("IVF4096,SQ8", 32, Metric.L2).training_rows == 64 * 4096
    assert check_factory("IVF4096,SQ8", 32, Metric.L2).min_training_rows == 39 * 4096
    assert check_factory("IVF16,PQ8", 32, Metric.L2).min_training_rows == 39 * 256
    assert check_factory("Flat", 32, Metric.L2).training_rows == 0


def test_nlist_grows_with_the_root():
    assert [choose_nlist(n) for n in (1, 64, 10**6, 10**8, 10**9, 10**12)] == [
        1,
        1,
        8192,
        65536,
        262144,
        2**20,
    ]


@pytest.mark.parametrize(
    "factory", ["IVF16,SQ8", "RR,IVF16,RaBitQ", "Flat", "SQ8", "IVF16,PQ8x4", "HNSW16", "HNSW32,SQ8"]
)
def test_estimated_bytes_are_near_the_file(make_vectors, factory):
    spec = check_factory(factory, 32, Metric.L2)
    rows = make_vectors(5000)
    index = faiss.index_factory(32, spec.factory)
    index.train(rows)
    index.add_with_ids(rows, np.arange(5000))
    size = faiss.serialize_index(index).nbytes
    assert abs(index_bytes(spec, 5000) - size) < 0.07 * size


def test_two_packages_are_refused():
    check_distributions({"faiss-cpu"}.__contains__)
    check_distributions({"torch"}.__contains__)
    with pytest.raises(InstallationError, match="faiss-cpu and faiss-gpu are both installed"):
        check_distributions({"faiss-cpu", "faiss-gpu"}.__contains__)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        ("sys.modules['faiss'] = None", "bge-ray[cpu]"),
        ("sys.modules['faiss'] = types.ModuleType('faiss')", "empty remainder"),
    ],
)
def test_missing_package_says_what_to_install(prepare, message):
    code = (
        f"import sys, types; {prepare}\n"
        "from bge_ray.errors import InstallationError\n"
        "try:\n    import bge_ray.index.package\n"
        "except InstallationError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert message in done.stdout
