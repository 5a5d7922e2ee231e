"""One side of a link: from tokens to an exact value, or to nothing if a part of it is not surely understood."""

from fractions import Fraction
from typing import NamedTuple, cast

from trl_sgpo.judges.arithmetic.tokens import CONNECTORS, END, TAKES_PART, Number, Token, read_number, stem


MAX_BITS = 1024  # of a numerator or a denominator
MAX_DEPTH = 40
MAX_TOKENS = 600  # of one side of a link
MAX_UNIT_WORDS = 3
ZERO = cast(Fraction, 0)


class Memory:
    """What is carried from one step of a completion to the next."""

    def __init__(self) -> None:
        self.checked = 0
        self.names: dict[str, Fraction] = {}
        self.rounded: set[Fraction] = set()  # literals that stood for a rounded value
        self.x_is_unknown = False  # an "x" stood where no product can be


class _Skip(Exception):
    """What stands here is not surely understood."""


class _Value(NamedTuple):
    value: Fraction
    slack: Fraction = ZERO  # how far off the value may be, because operands were rounded
    percent: bool = False


class Reader:
    """A recursive-descent reader of one side of a link. After `read`, it is what is known of that side."""

    def __init__(self, tokens: list[Token], start: int, stop: int, memory: Memory, negate: bool = False) -> None:
        self.tokens = tokens
        self.start = self.end = start
        self.stop = stop
        self.memory = memory
        self.negate = negate  # the sign of a list's item, if it was a minus
        self.european = False
        self.depth = self.operations = 0
        self.uncertain = self.percent = self.coarse = self.named = False
        self.words: list[str] = []  # all words that are read over
        self.units: list[str] = []
        self.rates: list[str] = []
        self.literal: Number | None = None
        self.prefixes: list[Fraction] = []  # what it comes to before each operator outside of brackets
        self.number = _Value(ZERO)

    def read(self, european: bool = False) -> "Reader | None":
        self.european = european
        if self.stop - self.start > MAX_TOKENS:
            return None
        try:
            self.number = self.expression()
        except _Skip:
            return None
        if self.operations:
            self.literal = None
        return self

    def again(self, european: bool = False, negate: bool = False) -> "Reader | None":
        """The same tokens in another reading."""
        return Reader(self.tokens, self.start, self.end, self.memory, negate).read(european)

    def peek(self, ahead: int = 0) -> Token:
        i = self.end + ahead
        return self.tokens[i] if i < self.stop else END

    def sign(self, symbols: str) -> str:
        token = self.peek()
        if token.kind == "o" and token.text in symbols:
            self.end += 1
            return token.text
        return ""

    def expression(self) -> _Value:
        left = self.term()
        while symbol := self.sign("+-"):
            if not self.depth:
                self.prefixes.append(left.value)
            right = self.term()
            self.operations += 1
            self.uncertain |= left.percent != right.percent  # 100 - 20% may mean 80
            value = left.value + right.value if symbol == "+" else left.value - right.value
            left = _Value(_bounded(value), left.slack + right.slack, left.percent and right.percent)
        return left

    def term(self) -> _Value:
        left = self.factor()
        divided = False
        while True:
            before = self.tokens[self.end - 1]
            token, follow = self.peek(), self.peek(1)
            symbol = "*"
            if token.kind == "o" and token.text in "*/":
                symbol = token.text
            elif token.kind == "v" and token.text in "xX":
                if before.kind not in "n)" or token.start == before.end or token.end == follow.start:
                    raise _Skip
                # "4 x -2" and "4 x (2)" may be products
                self.uncertain |= self.memory.x_is_unknown or follow.kind != "n"
                if follow.kind not in ("n", "(") and not (follow.text == "-" and self.peek(2).start == follow.end):
                    raise _Skip
            elif token.kind == "(" and before.kind in "n)":
                if divided:
                    raise _Skip  # 1 / 2(3)
                self.uncertain |= token.start > before.end and before.kind == "n"
            elif token.text != "of" or before.text != "%" or follow.kind != "n":
                return left
            if token.kind != "(":
                self.end += 1
            if not self.depth:
                self.prefixes.append(left.value)
            powers = self.tokens[self.end : self.end + 2]
            right = self.factor()
            self.operations += 1
            if symbol == "*":
                # 1 / 2.4 * 10^8 may have the product below the line
                self.uncertain |= divided and len(powers) == 2 and powers[1].text == "^"
                slack = ZERO
                if left.slack or right.slack:
                    slack = _bounded(abs(left.value) * right.slack + abs(right.value) * left.slack)
                left = _Value(_bounded(left.value * right.value), slack)
            else:
                self.uncertain |= divided  # 25 / 1/3
                divided = True
                left = _quotient(left, right)

    def factor(self) -> _Value:
        negative, self.negate = self.negate, False
        signed = negative
        while symbol := self.sign("+-"):
            negative ^= symbol == "-"
            signed = True
        first = self.peek()
        base = self.atom()
        if self.sign("^"):
            self.uncertain |= signed and first.kind == "n"  # -2^2
            base = _power(base, self.exponent())
            self.operations += 1
            if self.peek().text == "^":
                raise _Skip
            self.read_units()
        elif self.sign("%"):
            self.percent = True
            base = _Value(Fraction(base.value) / 100, Fraction(base.slack) / 100, True)
            self.read_units()
        return _Value(-base.value, base.slack, base.percent) if negative else base

    def exponent(self) -> int:
        value = self.group().value if self.peek().kind == "(" else self.digits().value
        if value.denominator != 1:
            raise _Skip
        return int(value)

    def digits(self) -> Number:
        token = self.peek()
        number = None
        if token.kind == "n":
            number = read_number(token.text, self.european)
            if number is None and "." in token.text and not self.european:
                number = read_number(token.text, european=True)  # 1.234,56
        if number is None:
            raise _Skip
        self.end += 1
        return number

    def atom(self) -> _Value:
        token = self.peek()
        if token.kind == "n":
            self.literal = number = self.digits()
            self.coarse |= number.decimals > 0
            if self.peek().kind in ("n", "f"):
                raise _Skip  # 1 1/2
            rounded = number.decimals >= 3 or number.value in self.memory.rounded
            result = _Value(number.value, Fraction(1, 10**number.decimals) if rounded else ZERO)
        elif token.kind == "v" and token.text in self.memory.names:
            self.end += 1
            self.named = True
            result = _Value(self.memory.names[token.text])
        elif token.kind == "(":
            result = self.group()
        elif token.kind == "f":
            self.end += 1
            self.operations += 1
            follow = self.peek()
            if follow.kind == "n" and len(follow.text) == 2 and follow.text.isdigit():  # \frac12
                self.end += 1
                result = _quotient(_Value(Fraction(follow.text[0])), _Value(Fraction(follow.text[1])))
            else:
                result = _quotient(self.argument(), self.argument())
        else:
            raise _Skip
        self.read_units()
        return result

    def argument(self) -> _Value:
        token = self.peek()
        if token.kind == "n" and len(token.text) == 1:
            self.end += 1
            return _Value(Fraction(token.text))
        if token.kind != "(":
            raise _Skip
        return self.group()

    def group(self) -> _Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Skip
        self.end += 1
        value = self.expression()
        if self.peek().kind != ")":
            raise _Skip
        self.end += 1
        self.depth -= 1
        return value

    def read_units(self) -> None:
        """Steps over what may stand after a number: `apples`, `/student`, `(in total)`."""
        while True:
            token, follow = self.peek(), self.peek(1)
            if token.text == "/" and follow.kind == "w":
                self.rates.append(stem(follow.text))
                self.words.append(stem(follow.text))
                self.end += 2
            elif token.kind == "(" and follow.kind == "w" and token.start > self.tokens[self.end - 1].end:
                end = 1
                while self.peek(end).kind in ("w", "n") and end < 16:
                    end += 1
                if self.peek(end).kind != ")":
                    raise _Skip
                self.words.append(stem(self.peek(end - 1).text))
                self.end += end + 1
            elif token.kind == "w":
                run: list[str] = []
                while self.peek(len(run)).kind == "w" and len(run) <= MAX_UNIT_WORDS:
                    run.append(self.peek(len(run)).text.lower())
                after = self.peek(len(run))
                if len(run) > MAX_UNIT_WORDS or after.kind not in ("", "o", ")", "(") or after.text in ("^", "%"):
                    return
                if not (CONNECTORS | TAKES_PART | {"and"}).isdisjoint(run):
                    return
                self.units.append(stem(run[-1]))
                self.words += map(stem, run)
                self.end += len(run)
            else:
                return


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise _Skip
    return value


def _quotient(top: _Value, bottom: _Value) -> _Value:
    if not bottom.value:
        raise _Skip
    value = _bounded(Fraction(top.value) / bottom.value)
    if not top.slack and not bottom.slack:
        return _Value(value)
    return _Value(value, _bounded((top.slack + abs(value) * bottom.slack) / abs(bottom.value)))


def _power(base: _Value, exponent: int) -> _Value:
    value = base.value
    bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    if abs(exponent) * bits > MAX_BITS or (value == 0 and exponent <= 0):
        raise _Skip
    result = Fraction(value) ** exponent
    return _Value(result, _bounded(abs(exponent * result / value) * base.slack) if base.slack and value else ZERO)
