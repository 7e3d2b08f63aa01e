"""What bench/gpu_audit.py launches of kernels/triton/kl.py."""

import torch

NEEDS = {"both": (True, True), "policy": (True, False), "reference": (False, True)}


def bytes_needed(dtype):
    """{op: {kernel: [(bytes read, bytes written) for a column, ...]}}."""
    read = 2 * dtype.itemsize
    forward = {"_full_kl_kernel": [(read, 0)]}
    needed = {"full_kl": forward, "full_kl[mask]": forward}
    if dtype == torch.bfloat16:
        needed["full_kl[fp32 reference]"] = {"_full_kl_kernel": [(2 + 4, 0)]}
    for name, needs in NEEDS.items():
        needed[f"full_kl_backward[{name}]"] = {"_full_kl_backward_kernel": [(read, dtype.itemsize * sum(needs))]}
    return needed


def launches(ops, dtype):
    """{op: [(function, args) that differ in all that must not matter]}."""

    def rows(V, n=3, skip=0):
        return torch.zeros(n * V + skip, dtype=dtype)[skip:].view(n, V)

    sliced = torch.zeros(2, 4, 40, dtype=dtype)[:, :-1]
    far = torch.zeros(1, 8, dtype=dtype).expand(2, 70_000, 8)
    cases = [(rows(4096), 1.0), (rows(151_936), 0.7), (rows(50_257), 1), (rows(1), 2.0), (rows(16), 1 / 3)]
    cases += [(rows(1000, skip=1), 1.0), (rows(17, n=1), 0.1), (sliced, 1.0), (far, 1.0)]
    launches = {name: [] for name in ("full_kl", "full_kl[mask]")}
    if dtype == torch.bfloat16:
        launches["full_kl[fp32 reference]"] = []
    launches |= {f"full_kl_backward[{name}]": [] for name in NEEDS}
    for z, temperature in cases:
        temperature = torch.tensor(temperature)
        x, two = torch.zeros(z.shape[:-1]), torch.zeros(*z.shape[:-1], 2)
        launches["full_kl"].append((ops.full_kl, (z, z, None, temperature)))
        launches["full_kl[mask]"].append((ops.full_kl, (z, z, x == 0, temperature)))
        if dtype == torch.bfloat16:
            launches["full_kl[fp32 reference]"].append((ops.full_kl, (z, z.float(), None, temperature)))
        for name, needs in NEEDS.items():
            args = (x, z, z, None, x, two, two, temperature, *needs)
            launches[f"full_kl_backward[{name}]"].append((ops.full_kl_backward, args))
    if dtype == torch.float32:
        launches |= {"kl_divergence": [], "kl_divergence_backward": []}
        tokens = (torch.zeros(8192), torch.zeros(4, 5), torch.zeros(1), torch.zeros(4097)[1:])
        for i, x in enumerate(tokens):
            clamp = torch.tensor([20.0, 10.0 + i])
            launches["kl_divergence"].append((ops.kl_divergence, (x, x, i, clamp)))
            launches["kl_divergence_backward"].append((ops.kl_divergence_backward, (x, x, x, i, clamp)))
    return launches
