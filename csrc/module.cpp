// The Python module fastrlhf._C. Importing it runs the static registrations of ops.cpp and cpu/*.cpp.

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <stdexcept>

#include "cpu/capability.h"

static PyObject* cpu_capability(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(fastrlhf::cpu_capability_name());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

static PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS, "Which build of the CPU kernels runs: avx512, avx2 or portable."},
    {nullptr, nullptr, 0, nullptr},
};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
