"""DLPack in ctypes, for arrays that no library would make."""

import ctypes


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


class Old(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", Deleter)]


READ_ONLY = 1  # of the flags
CapsuleDestructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def python_api(name, result, *arguments):
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


new_capsule = python_api("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
capsule_pointer = python_api("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
raw_is_valid = python_api("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)


def tensor_of(producer):
    """A copy of the DLTensor of an object that supports DLPack 1, with its own shape and strides."""
    capsule = producer.__dlpack__(max_version=(1, 0))
    managed = Versioned.from_address(capsule_pointer(capsule, b"dltensor_versioned"))
    copy = DLTensor()
    ctypes.pointer(copy)[0] = managed.tensor
    for name in ("shape", "strides"):
        numbers = getattr(managed.tensor, name)
        if numbers:  # the capsule owns these, and it dies here
            own = (ctypes.c_int64 * max(copy.ndim, 1))(*numbers[: copy.ndim])
            setattr(copy, name, ctypes.cast(own, ctypes.POINTER(ctypes.c_int64)))
    return copy
