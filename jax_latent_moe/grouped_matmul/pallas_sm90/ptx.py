"""The machine of `words` as inlined Mosaic GPU code: words are MLIR values, and operations PTX instructions."""

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

WARPGROUP_THREADS = 128


def _i32():
    return ir.IntegerType.get_signless(32)


def _value(word):
    return mgpu.c(word - (word >> 31 << 32), _i32()) if isinstance(word, int) else word.value


class Word:
    """A 32-bit register with the operators of an unsigned integer."""

    def __init__(self, value):
        self.value = value

    def _apply(self, operation, other):
        return Word(operation(self.value, _value(other)))

    def __and__(self, other):
        return self._apply(arith.andi, other)

    def __or__(self, other):
        return self._apply(arith.ori, other)

    def __lshift__(self, other):
        return self._apply(arith.shli, other)

    def __rshift__(self, other):
        return self._apply(arith.shrui, other)

    def __add__(self, other):
        return self._apply(arith.addi, other)

    def __mul__(self, other):
        return self._apply(arith.muli, other)

    def __rsub__(self, other):
        return Word(arith.subi(_value(other), self.value))


def _asm(instruction, *words, constraints=None, result=None):
    constraints = constraints or ",".join(["=r", *["r"] * len(words)])
    return llvm.inline_asm(result or _i32(), [_value(word) for word in words], instruction, constraints)


class Ptx:
    """Instructions of one thread of a warpgroup."""

    def __init__(self):
        self.thread = Word(arith.remui(mgpu_utils.thread_idx(), mgpu.c(WARPGROUP_THREADS, _i32())))

    def of_lane_bit(self, bit, if_zero, if_one):
        """A constant that depends on a bit of the thread's number."""
        is_zero = arith.cmpi(arith.CmpIPredicate.eq, (self.thread & 1 << bit).value, _value(0))
        return Word(arith.select(is_zero, _value(if_zero), _value(if_one)))

    def row(self, half):
        """The output of the thread's fragments in the first or second 8 of its warp's 16."""
        return ((self.thread >> 5) << 4) + ((self.thread & 31) >> 2) + 8 * half

    def from_lane(self, word, distance):
        """The word of the thread whose number differs by one bit."""
        return Word(mgpu_utils.shfl_bfly(word.value, distance))

    def prmt(self, a, b, select):
        """Four bytes chosen from those of a, numbered 0 to 3, and of b, 4 to 7."""
        return Word(_asm("prmt.b32 $0, $1, $2, $3;", a, b, select))

    def rotated_right(self, word, count):
        """The word with its bits moved down by a constant count, the lowest ones to the top."""
        return Word(_asm(f"shf.r.wrap.b32 $0, $1, $1, {count};", word))

    def if_nonzero(self, word, value):
        """The value if the word is not zero, else 0."""
        nonzero = arith.cmpi(arith.CmpIPredicate.ne, word.value, _value(0))
        return Word(arith.select(nonzero, _value(value), _value(0)))

    def least(self, word, bound):
        """The smaller of two unsigned numbers."""
        return Word(arith.minui(word.value, _value(bound)))

    def sub_bf16(self, a, b):
        """The difference of two pairs of bfloat16."""
        return Word(_asm("sub.bf16x2 $0, $1, $2;", a, b))

    def mul_bf16(self, a, b):
        """The product of two pairs of bfloat16, with subnormal numbers."""
        return Word(_asm("mul.bf16x2 $0, $1, $2;", a, b))

    def e4m3_to_float32(self, word):
        """The values of the lower two bytes."""
        both = llvm.StructType.get_literal([_i32(), _i32()])
        code = """
        {
        .reg .b16 pair, high, a, b;
        .reg .b32 halves;
        .reg .f32 x, y;
        mov.b32 {pair, high}, $2;
        cvt.rn.f16x2.e4m3x2 halves, pair;
        mov.b32 {a, b}, halves;
        cvt.f32.f16 x, a;
        cvt.f32.f16 y, b;
        mov.b32 $0, x;
        mov.b32 $1, y;
        }
        """
        values = _asm(code, word, constraints="=r,=r,r", result=both)
        return [Word(llvm.extractvalue(_i32(), values, [i])) for i in range(2)]

    def mul_float32(self, a, b):
        """The product of two float32, with subnormal numbers."""
        f32 = ir.F32Type.get()
        product = arith.mulf(*(arith.bitcast(f32, _value(word)) for word in (a, b)))
        return Word(arith.bitcast(_i32(), product))

    def to_bf16_pair(self, low, high):
        """Two float32, rounded to nearest even, as a pair."""
        code = "{ .reg .f32 x, y; mov.b32 x, $1; mov.b32 y, $2; cvt.rn.bf16x2.f32 $0, y, x; }"
        return Word(_asm(code, low, high))

    def load(self, memory, offset, count):
        """1, 2 or 4 bytes of shared memory, which the offset is a multiple of, as an unsigned number."""
        pointer = mgpu_utils.getelementptr(memory, [offset.value], ir.IntegerType.get_signless(8))
        loaded = llvm.load(ir.IntegerType.get_signless(8 * count), pointer)
        return Word(loaded if count == 4 else arith.extui(_i32(), loaded))


def memory_of(ref):
    """The address of a plain tile in shared memory."""
    return mgpu_utils.memref_ptr(ref)


def word_of(scalar: mgpu.FragmentedArray) -> Word:
    """An int32 or float32 that all threads share."""
    value = scalar.registers.item()
    return Word(value if value.type == _i32() else arith.bitcast(_i32(), value))


def words_of(array: mgpu.FragmentedArray) -> list[Word]:
    """The words of a fragmented array of bytes, in the order of its registers."""
    return [Word(mgpu_utils.bitcast(register, _i32())) for register in array.registers.flat]


def array_of(words: list[Word], shape, dtype) -> mgpu.FragmentedArray:
    """The array of a 16-bit dtype with the layout of wgmma's operands that has these words."""
    layout, pair = mgpu.WGMMA_LAYOUT, ir.VectorType.get((2,), mgpu_utils.dtype_to_ir_type(dtype))
    registers = np.empty(len(words), dtype=object)
    registers[:] = [mgpu_utils.bitcast(word.value, pair) for word in words]
    registers = registers.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
