"""How models are told of tools and write calls of them: thirteen formats, each written and read back.

A tool is a JSON schema, as OpenAI's ``tools`` hold it or without the ``{"type": "function"}`` around it. A call is
``{"type": "function", "function": {"name": ..., "arguments": {...}}}``.
"""

from __future__ import annotations

import ast
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

Tool = dict[str, Any]
Call = dict[str, Any]

LLAMA3_DATE = "01 Jan 2025"
"""What llama3 says is today. It is the same day always: the day of the run would make other tokens of the same rows
tomorrow, and would have the model that was trained read another date at each use."""


class ToolError(ValueError):
    """Tools or calls that a format cannot write."""


class ToolFormat(ABC):
    """One way to write tools and calls."""

    @abstractmethod
    def system_text(self, tools: list[Tool]) -> str:
        """Return what the system message says of the tools."""

    @abstractmethod
    def call_text(self, calls: list[Call]) -> str:
        """Return what the assistant writes to call.

        Raises:
            ToolError: The format has no way to write these calls.
        """

    @abstractmethod
    def parse(self, text: str, tools: list[Tool] | None = None) -> tuple[str, list[Call]]:
        """Return a reply's text and its calls; a reply whose calls cannot be read is all text.

        With the tools at hand, an argument that is declared a string stays one in formats that write texts without
        quotes (``5`` is else a number).
        """


def function_of(tool: Tool) -> Tool:
    """Return a tool's schema without the ``{"type": "function"}`` around it.

    Raises:
        ToolError: It has no name.
    """
    function = tool.get("function", tool) if tool.get("type") == "function" else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ToolError(f"a tool has no name: {to_json(tool)[:200]}")
    return function


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON with every letter as it is."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _wrapped(tool: Tool) -> Tool:
    return tool if tool.get("type") == "function" else {"type": "function", "function": tool}


def _named(calls: list[Call]) -> Iterator[tuple[str, dict[str, Any]]]:
    for call in calls:
        yield call["function"]["name"], call["function"]["arguments"]


def _call(name: str, arguments: Any) -> Call:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _from_objects(value: Any, arguments: str) -> list[Call] | None:
    """Return the calls in a JSON object or a list of them, or None if there is anything else in it."""
    objects = value if isinstance(value, list) else [value]
    if not objects or not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in objects):
        return None
    if not all(isinstance(one.get(arguments), dict) for one in objects):
        return None
    return [_call(one["name"], one[arguments]) for one in objects]


def _decoded(text: str, start: int = 0) -> tuple[Any, int]:
    """Return the JSON value at a place of a text, and where it ends; (None, -1) if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, -1


def _json_lines(text: str) -> list[Any] | None:
    """Return the JSON values that follow one another in a text, or None if there is anything else in it."""
    values: list[Any] = []
    at = 0
    while at < len(text := text.strip()):
        value, at = _decoded(text, at)
        if at < 0:
            return None
        values.append(value)
        at += len(text[at:]) - len(text[at:].lstrip())
    return values


def _outside(text: str, spans: list[tuple[int, int]]) -> str:
    """Return what a text says before the first and behind the last of some spans."""
    return (text[: spans[0][0]] + text[spans[-1][1] :]).strip()


class Default(ToolFormat):
    """Action and Action Input, for models that have learned no format of their own."""

    _ACTION = re.compile(r"^Action:[ \t]*(\S+)\s*Action Input:\s*(?=\{)", re.MULTILINE)

    def system_text(self, tools: list[Tool]) -> str:
        """List the tools with their arguments, and say how to call them."""
        functions = [function_of(tool) for tool in tools]
        listed = "".join(
            f"> Tool Name: {function['name']}\nTool Description: {function.get('description', '')}\n"
            f"Tool Args:\n{self._arguments(function)}\n"
            for function in functions
        )
        names = ", ".join(function["name"] for function in functions)
        return (
            f"You have access to the following tools:\n{listed}Use the following format if using a tool:\n```\n"
            f"Action: tool name (one of [{names}])\nAction Input: the input to the tool, in a JSON format "
            'representing the kwargs (e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
        )

    @staticmethod
    def _arguments(function: Tool) -> str:
        parameters = function.get("parameters") or {}
        lines = []
        for name, schema in (parameters.get("properties") or {}).items():
            required = ", required" if name in (parameters.get("required") or []) else ""
            choices = ", ".join(map(str, schema.get("enum") or []))
            items = schema.get("items")
            lines.append(
                f"  - {name} ({schema.get('type', '')}{required}): {schema.get('description', '')}"
                + (f", should be one of [{choices}]" if choices else "")
                + (f", where each item should be {items.get('type', '')}" if items else "")
                + "\n"
            )
        return "".join(lines)

    def call_text(self, calls: list[Call]) -> str:
        """Write two lines a call."""
        return "\n".join(f"Action: {name}\nAction Input: {to_json(arguments)}" for name, arguments in _named(calls))

    def parse(self, text: str, tools: list[Tool] | None = None) -> tuple[str, list[Call]]:
        """Read the calls back."""
        calls: list[Call] = []
        spans: list[tuple[int, int]] = []
        for found in self._ACTION.finditer(text):
            arguments, end = _decoded(text, found.end())
            if not isinstance(arguments, dict):
                return text, []
            if not spans or found.start() >= spans[-1][1]:  # else it stands in a string of the call before
                calls.append(_call(found[1], arguments))
                spans.append((found.start(), end))
        return (_outside(text, spans), calls) if calls else (text, [])


class Phi4Mini(Default):
    """Phi-4-mini's tool tags; it has no format of calls in the peer, so they are written as in ``default``."""

    def system_text(self, tools: list[Tool]) -> str:
        """List the tools as JSON."""
        return f"<|tool|>{to_json(tools)}<|/tool|>"


class Glm4(ToolFormat):
    """GLM-4: a name, and the arguments in the next line."""

    _NAME = re.compile(r"^(\S+)\n(?=\s*\{)", re.MULTILINE)

    def system_text(self, tools: list[Tool]) -> str:
        """Introduce ChatGLM, and list the tools as JSON."""
        listed = "".join(
            f"\n\n## {function['name']}\n\n{to_json(function, indent=4)}"
            "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"  # noqa: RUF001
            for function in map(function_of, tools)
        )
        return (
            "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"  # noqa: RUF001
            f"你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具{listed}"
        )

    def call_text(self, calls: list[Call]) -> str:
        """Write the one call that a message can hold."""
        if len(calls) != 1:
            raise ToolError(f"the tool format glm4 takes one call in a message, and here are {len(calls)}")
        ((name, arguments),) = _named(calls)
        return f"{name}\n{to_json(arguments)}"

    def parse(self, text: str, tools: list[Tool] | None = None) -> tuple[str, list[Call]]:
        """Read the call back: the last thing in the text."""
        for found in self._NAME.finditer(text):
            arguments, end = _decoded(text, text.index("{", found.end()))
            if isinstance(arguments, dict) and not text[end:].strip():
                return text[: found.start()].strip(), [_call(found[1], arguments)]
        return text, []


class _JsonAtTheEnd(ToolFormat):
    """Calls that are bare JSON at the end of a reply."""

    arguments: ClassVar[str]
    """What the key of the arguments is called."""

    _START = re.compile(r'\[\s*\{\s*"name"|\{\s*"name"')

    def parse(self, text: str, tools: list[Tool] | None = None) -> tuple[str, list[Call]]:
        """Read the calls back."""
        for found in self._START.finditer(text):
            value, end = _decoded(text, found.start())
            calls = _from_objects(value, self.arguments)
            if calls and not text[end:].strip():
                return text[: found.start()].strip(), calls
        return text, []


class Llama3(_JsonAtTheEnd):
    """Llama 3.1 and later: a JSON object with ``parameters``, or a list of them."""

    arguments = "parameters"

    def system_text(self, tools: list[Tool]) -> str:
        """State the dates, say how to call, and list the tools as JSON."""
        listed = "".join(to_json(_wrapped(tool), indent=4) + "\n\n" for tool in tools)
        return (
            f"Cutting Knowledge Date: December 2023\nToday Date: {LLAMA3_DATE}\n\n"
            "You have access to the following functions. To call a function, please respond with JSON for a function "
            'call. Respond in the format {"name": function name, "parameters": dictionary of argument name and its '
            f"value}}. Do not use variables.\n\n{listed}"
        )

    def call_text(self, calls: list[Call]) -> str:
        """Write an object, or a list of several."""
        objects = [{"name": name, "parameters": arguments} for name, arguments in _named(calls)]
        return to_json(objects[0] if len(objects) == 1 else objects)


class Mistral(_JsonAtTheEnd):
    """Mistral from v0.3 on: a JSON list, behind the template's ``[TOOL_CALLS]``."""

    arguments = "arguments"

    def system_text(self, tools: list[Tool]) -> str:
        """List the tools as JSON."""
        return f"[AVAILABLE_TOOLS] {to_json([_wrapped(tool) for tool in tools])}[/AVAILABLE_TOOLS]"

    def call_text(self, calls: list[Call]) -> str:
        """Write a list."""
        return to_json([{"name": name, "arguments": arguments} for name, arguments in _named(calls)])

    def parse(self, text: str, tools: list[Tool] | None = None) -> tuple[str, list[Call]]:
        """Read the calls back, with or without the mark before them."""
        content, calls = super().parse(text.replace("[TOOL_CALLS]", "", 1))
        return (content, calls) if calls else (text, [])


class Qwen(ToolFormat):
    """Qwen 2.5 and 3: a JSON object in tags for each call."""

    _CALL = re.compile(r"<tool_call>(.+?)</tool_call>(?=\s*<tool_call>|\s*$)", re.DOTALL)

    begins = "\n\n"

    def system_text(self, tools: list[Tool]) -> str:
        """List the tools as JSON, and say how to call them."""
        listed = "".join("\n" + to_json(_wrapped(tool)) for tool in tools)
        return (
            f"{self.begins}# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{listed}\n</tools>\n\n"
            "For each function call, return a json object with function name and arguments within "
            '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
            '"arguments": <args-json-object>}\n</tool_call>'
        )

    def call_text(self, calls: list[Call]) -> str:
        """Write each call in tags."""
        objects = ({"name": name, "arguments": arguments} for name, arguments in _named(calls))
        return "\n".join(f"<tool_call>\n{to_json(one)}\n</tool_call>" for one in objects)

    def parse(self, text: str, tools: list[Tool] | None = None) -> tuple[str, list[Call]]:
        """Read the calls back."""
        spans, calls = [], []
        for found in self._CALL.finditer(text):
            read = _from_objects((_json_lines(found[1]) or [None])[0], "arguments")
            if read is None:
                return text, []
            calls += read
            spans.append(found.span())
        return (_outside(text, spans), calls) if calls else (text, [])


class Ling(Qwen):
    """Ling v2: Qwen's format, with thinking switched off by the system message."""

    begins = ""

    def system_text(self, tools: list[Tool]) -> str:
        """List the tools as Qwen's."""
        return super().system_text(tools) + "\ndetailed thinking off"


class MiniMax1(ToolFormat):
    """MiniMax-M1: JSON objects, one a line, in one pair of tags."""

    _CALLS = re.compile(r"<tool_calls>(.+?)</tool_calls>\s*$", re.DOTALL)

    def system_text(self, tools: list[Tool]) -> str:
        """List the tools as JSON, and say how to call them."""
        listed = "".join(to_json(function_of(tool)) + "\n" for tool in tools)
        return (
            f"You are provided with these tools:\n<tools>\n{listed}</tools>\n\n"
            "If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide tool-name "
            "and json-object of arguments, following the format below:\n<tool_calls>\n"
            '{"name": <tool-name-1>, "arguments": <args-json-object-1>}\n...\n</tool_calls>'
        )

    def call_text(self, calls: list[Call]) -> str:
        """Write all calls in tags."""
        lines = (to_json({"name": name, "arguments": arguments}) for name, arguments in _named(calls))
        return "<tool_calls>\n" + "\n".join(lines) + "\n</tool_calls>"

    def parse(self, text: str, tools: list[Tool] | None = None) -> tuple[str, list[Call]]:
        """Read the calls back."""
        if (found := self._CALLS.search(text)) and (calls := _from_objects(_json_lines(found[1]), "arguments")):
            return text[: found.start()].strip(), calls
        return text, []


class _ArgumentTags(ToolFormat):
    """Each argument in tags of its own: a text as it is, everything else as JSON."""

    call: ClassVar[re.Pattern[str]]
    """A whole call: its name, its arguments."""

    argument: ClassVar[re.Pattern[str]]
    """An argument: its name, its value."""

    opening: ClassVar[str]
    closing: ClassVar[str]
    around: ClassVar[str]
    """An argument, with ``{key}`` and ``{value}``."""

    wrapper: ClassVar[tuple[str, str]] = ("", "")
    """What stands around all calls of a message."""

    def call_text(self, calls: list[Call]) -> str:
        """Write the calls one below the other."""
        written = (
            self.opening.replace("{name}", name)
            + "".join(self._argument(key, value) for key, value in arguments.items())
            + self.closing
            for name, arguments in _named(calls)
        )
        return self.wrapper[0] + "\n".join(written) + self.wrapper[1]

    def _argument(self, key: str, value: Any) -> str:
        before, after = self.around.replace("{key}", key).split("{value}", 1)
        return before + (value if isinstance(value, str) else to_json(value)) + after

    def parse(self, text: str, tools: list[Tool] | None = None) -> tuple[str, list[Call]]:
        """Read the calls back."""
        calls = list(self.call.finditer(text))
        if not calls:
            return text, []
        content = _outside(text, [found.span() for found in calls])
        return content, [_call(found[1], self._arguments(found[1], found[2], tools)) for found in calls]

    def _arguments(self, name: str, body: str, tools: list[Tool] | None) -> dict[str, Any]:
        strings = _string_arguments(name, tools or [])
        return {key: _bare(value, key in strings) for key, value in self.argument.findall(body)}


def _string_arguments(name: str, tools: list[Tool]) -> set[str]:
    for function in map(function_of, tools):
        if function["name"] == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {key for key, schema in properties.items() if schema.get("type") == "string"}
    return set()


def _bare(text: str, is_string: bool) -> Any:
    """Return the value that a text without quotes stands for."""
    if is_string:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


class Qwen35(_ArgumentTags):
    """Qwen 3.5 and Qwen3-Coder: a function tag with parameter tags in it."""

    call = re.compile(r"<tool_call>\s*<function=\s*([^\s<>]+?)\s*>(.*?)</function>\s*</tool_call>", re.DOTALL)
    argument = re.compile(r"<parameter=(.*?)>\n?(.*?)\n?</parameter>", re.DOTALL)
    opening = "<tool_call>\n<function={name}>"
    around = "\n<parameter={key}>\n{value}\n</parameter>"
    closing = "\n</function>\n</tool_call>"

    def system_text(self, tools: list[Tool]) -> str:
        """List the tools as JSON, and say how to call them."""
        listed = "".join("\n" + to_json(function_of(tool)) for tool in tools)
        return (
            f"\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>{listed}\n</tools>\n\n"
            "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
            "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
            "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\n"
            "multiple lines\n</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n"
            "- Function calls MUST follow the specified format: an inner <function=...></function> block must be "
            "nested within <tool_call></tool_call> XML tags\n- Required parameters MUST be specified\n"
            "- You may provide optional reasoning for your function call in natural language BEFORE the function call, "
            "but NOT after\n- If there is no function call available, answer the question like normal with your "
            "current knowledge and do not tell the user about function calls\n</IMPORTANT>"
        )


class Glm4Moe(_ArgumentTags):
    """GLM-4.5 and later: a name, then tags of keys and values."""

    call = re.compile(r"<tool_call>\s*([^\s<>]+)(.*?)</tool_call>", re.DOTALL)
    argument = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
    opening = "\n<tool_call>{name}"
    around = "\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>"
    closing = "\n</tool_call>"

    def system_text(self, tools: list[Tool]) -> str:
        """List the tools as JSON, and say how to call them."""
        listed = "".join("\n" + to_json(_wrapped(tool)) for tool in tools)
        return (
            "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{listed}\n</tools>\n\n"
            "For each function call, output the function name and arguments within the following XML format:"
            "\n<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>"
            "\n<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>\n"
        )


class MiniMax2(_ArgumentTags):
    """MiniMax-M2: invoke tags with parameter tags in them, all calls of a message in one pair of tags."""

    call = re.compile(r'<invoke name="(.*?)">(.*?)</invoke>', re.DOTALL)
    argument = re.compile(r'<parameter name="(.*?)">(.*?)</parameter>', re.DOTALL)
    opening = '<invoke name="{name}">'
    around = '\n<parameter name="{key}">{value}</parameter>'
    closing = "\n</invoke>"
    wrapper = ("<minimax:tool_call>\n", "\n</minimax:tool_call>")

    def system_text(self, tools: list[Tool]) -> str:
        """List the tools as JSON, and say how to call them."""
        listed = "".join(f"<tool>{to_json(function_of(tool))}</tool>\n" for tool in tools)
        return (
            "\n\n# Tools\n\nYou may call one or more tools to assist with the user query.\n"
            f"Here are the tools available in JSONSchema format:\n\n<tools>\n{listed}</tools>\n\n"
            "When making tool calls, use XML format to invoke tools and pass parameters:\n"
            '\n<minimax:tool_call>\n<invoke name="tool-name-1">\n<parameter name="param-key-1">param-value-1'
            '</parameter>\n<parameter name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n'
            "</minimax:tool_call>"
        )

    def parse(self, text: str, tools: list[Tool] | None = None) -> tuple[str, list[Call]]:
        """Read the calls back, with or without the tags around them all."""
        content, calls = super().parse(text, tools)
        return (re.sub(r"</?minimax:tool_call>", "", content).strip(), calls) if calls else (text, [])


class SeedOss(_ArgumentTags):
    """Seed-OSS: a function tag with parameter tags in it."""

    call = re.compile(r"<seed:tool_call>\s*<function=\s*([^\s<>]+?)\s*>(.*?)</function>\s*</seed:tool_call>", re.DOTALL)
    argument = re.compile(r"<parameter=(.*?)>(.*?)</parameter>", re.DOTALL)
    opening = "\n<seed:tool_call>\n<function={name}>"
    around = "\n<parameter={key}>{value}</parameter>"
    closing = "\n</function>\n</seed:tool_call>"

    def system_text(self, tools: list[Tool]) -> str:
        """Introduce Doubao, list the tools as JSON, and say how to call them."""
        return (
            "system\nYou are Doubao, a helpful AI assistant. You may call one or more functions to assist with the "
            "user query.Tool List:\nYou are authorized to use the following tools (described in JSON Schema format). "
            "Before performing any task, you must decide how to call them based on the descriptions and parameters of "
            f"these tools.\n{to_json(tools)}\n工具调用请遵循如下格式:\n<seed:tool_call>\n"
            "<function=example_function_name>\n<parameter=example_parameter_1>value_1</parameter>\n"
            "<parameter=example_parameter_2>This is the value for the second parameter\nthat can span\nmultiple lines"
            "</parameter>\n</function>\n</seed:tool_call>\n"
        )


class Lfm2(ToolFormat):
    """LFM 2: a list of calls as Python writes them, with JSON's true, false and null."""

    _CALLS = re.compile(r"<\|tool_call_start\|>(.*?)<\|tool_call_end\|>", re.DOTALL)

    def system_text(self, tools: list[Tool]) -> str:
        """List the tools as JSON."""
        return f"List of tools: <|tool_list_start|>{to_json([function_of(tool) for tool in tools])}<|tool_list_end|>"

    def call_text(self, calls: list[Call]) -> str:
        """Write the calls between marks; quotes in a text are escaped."""
        written = []
        for name, arguments in _named(calls):
            if bad := [key for key in arguments if not key.isidentifier()]:
                raise ToolError(f"the tool format lfm2 cannot name the argument {bad[0]!r} of {name}")
            written.append(f"{name}({', '.join(f'{key}={to_json(value)}' for key, value in arguments.items())})")
        return f"<|tool_call_start|>[{', '.join(written)}]<|tool_call_end|>"

    def parse(self, text: str, tools: list[Tool] | None = None) -> tuple[str, list[Call]]:
        """Read the calls back."""
        if not (found := self._CALLS.search(text)):
            return text, []
        try:
            body = ast.parse(found[1].strip(), mode="eval").body
            nodes = body.elts if isinstance(body, ast.List) else [body]
            calls = [self._call(node) for node in nodes]
        except (SyntaxError, ValueError, TypeError, RecursionError):
            return text, []
        return (_outside(text, [found.span()]), calls) if calls else (text, [])

    @classmethod
    def _call(cls, node: ast.expr) -> Call:
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError("not a call with named arguments")
        arguments = {word.arg: cls._value(word.value) for word in node.keywords if word.arg}
        return _call(ast.unparse(node.func), arguments)

    @classmethod
    def _value(cls, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            if node.id not in (names := {"true": True, "false": False, "null": None}):
                raise ValueError(f"{node.id} is no value")
            return names[node.id]
        if isinstance(node, ast.List | ast.Tuple):
            return [cls._value(one) for one in node.elts]
        if isinstance(node, ast.Dict):
            return {cls._value(key): cls._value(one) for key, one in zip(node.keys, node.values, strict=True) if key}
        return ast.literal_eval(node)


class Gemma4(ToolFormat):
    """Gemma 4: objects with bare keys, and texts between ``<|"|>`` marks."""

    _QUOTE = '<|"|>'
    _START = re.compile(r"<\|tool_call>call:([^{\s]+)(?=\{)")
    _END = "<tool_call|>"

    def system_text(self, tools: list[Tool]) -> str:
        """Declare the tools, one a line."""
        return "\n".join(self._declaration(function_of(tool)) for tool in tools)

    def _declaration(self, function: Tool) -> str:
        parts = [f"description:{self._text(function.get('description', ''))}"]
        if parameters := function.get("parameters"):
            fields = []
            if properties := parameters.get("properties"):
                fields.append(f"properties:{{{','.join(map(self._property, properties, properties.values()))}}}")
            if required := parameters.get("required"):
                fields.append(f"required:[{','.join(map(self._text, required))}]")
            if kind := parameters.get("type"):
                fields.append(f"type:{self._text(str(kind).upper())}")
            parts.append(f"parameters:{{{','.join(fields)}}}")
        if response := function.get("response"):
            fields = [f"description:{self._text(response['description'])}"] if response.get("description") else []
            if str(response.get("type", "")).upper() == "OBJECT":
                fields.append(f"type:{self._text('OBJECT')}")
            parts.append(f"response:{{{','.join(fields)}}}")
        return f"declaration:{function['name']}{{{','.join(parts)}}}"

    def _property(self, name: str, schema: Tool) -> str:
        fields = [f"description:{self._text(schema['description'])}"] if schema.get("description") else []
        fields += [f"type:{self._text(str(schema['type']).upper())}"] if schema.get("type") else []
        return f"{name}:{{{','.join(fields)}}}"

    def call_text(self, calls: list[Call]) -> str:
        """Write the calls one behind the other, their keys in order of the alphabet."""
        return "".join(
            f"<|tool_call>call:{name}{self._written(arguments)}{self._END}" for name, arguments in _named(calls)
        )

    def _text(self, text: str) -> str:
        return f"{self._QUOTE}{text}{self._QUOTE}"

    def _written(self, value: Any) -> str:
        match value:
            case str():
                return self._text(value)
            case dict():
                return "{" + ",".join(f"{key}:{self._written(value[key])}" for key in sorted(value)) + "}"
            case list():
                return "[" + ",".join(map(self._written, value)) + "]"
        return to_json(value)

    def parse(self, text: str, tools: list[Tool] | None = None) -> tuple[str, list[Call]]:
        """Read the calls back."""
        spans, calls = [], []
        for found in self._START.finditer(text):
            try:
                arguments, end = self._read(text, found.end())
            except (ValueError, RecursionError):
                return text, []
            if not text.startswith(self._END, end):
                return text, []
            calls.append(_call(found[1], arguments))
            spans.append((found.start(), end + len(self._END)))
        return (_outside(text, spans), calls) if calls else (text, [])

    def _read(self, text: str, at: int) -> tuple[Any, int]:
        """Return the value that stands at a place, and where it ends.

        Raises:
            ValueError: No value stands there.
        """
        if text.startswith(self._QUOTE, at):
            end = text.index(self._QUOTE, at + len(self._QUOTE))
            return text[at + len(self._QUOTE) : end], end + len(self._QUOTE)
        if text.startswith("{", at):
            return self._read_object(text, at + 1)
        if text.startswith("[", at):
            return self._read_list(text, at + 1)
        return json.JSONDecoder().raw_decode(text, at)

    def _read_object(self, text: str, at: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        while not text.startswith("}", at):
            colon = text.index(":", at)
            key = text[at:colon].strip().removeprefix(self._QUOTE).removesuffix(self._QUOTE)
            found[key], at = self._read(text, colon + 1)
            at += text.startswith(",", at)
        return found, at + 1

    def _read_list(self, text: str, at: int) -> tuple[list[Any], int]:
        found = []
        while not text.startswith("]", at):
            value, at = self._read(text, at)
            found.append(value)
            at += text.startswith(",", at)
        return found, at + 1


TOOL_FORMATS: dict[str, ToolFormat] = {
    "default": Default(),
    "gemma4": Gemma4(),
    "glm4": Glm4(),
    "glm4_moe": Glm4Moe(),
    "lfm2": Lfm2(),
    "ling": Ling(),
    "llama3": Llama3(),
    "minimax1": MiniMax1(),
    "minimax2": MiniMax2(),
    "mistral": Mistral(),
    "phi4_mini": Phi4Mini(),
    "qwen": Qwen(),
    "qwen3_5": Qwen35(),
    "seed_oss": SeedOss(),
}
"""The formats by the name that ``template.tool_format`` takes."""
