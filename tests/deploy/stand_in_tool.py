"""Stands in for vitis-run, vitis_hls, vivado_hls and vivado: their arguments, exit codes, log lines and file layout.

Called as `stand_in_tool.py NAME ARGUMENTS…` in a project's folder. `STAND_IN` in the environment says what happens:
success, synthesis failure, cosim failure (exit code 0), csim mismatch, cosim mismatch, licence failure, hang, crash,
routing failure.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from vendor_texts import Figures, cosim_text, csynth_text, csynth_xml, timing_text, utilization_text

VERSIONS = {"vitis-run": "2024.2", "vitis_hls": "2023.1", "vivado_hls": "2019.2", "vivado": "2024.2"}
BANNERS = {
    "vitis-run": "****** vitis-run v{} (64-bit)",
    "vitis_hls": "Vitis HLS - High-Level Synthesis from C, C++ and OpenCL v{} (64-bit)",
    "vivado_hls": "Vivado(TM) HLS - High-Level Synthesis from C, C++ and SystemC v{} (64-bit)",
    "vivado": "Vivado v{} (64-bit)",
}
LICENCE = (
    "ERROR: [Common 17-345] A valid license was not found for feature 'Synthesis' and/or device 'xcvu13p'. Please run "
    "the Vivado License Manager for assistance in determining which features and devices are licensed for your system."
)


def main(name: str, arguments: list[str]) -> int:
    scenario = os.environ.get("STAND_IN", "success")
    version = os.environ.get("STAND_IN_VERSION", VERSIONS[name])
    say(BANNERS[name].format(version))
    if arguments in (["-version"], ["--version"]):
        return 0
    if arguments[-1] == "vivado.tcl":
        return route(arguments, scenario, version)
    settings = dict(re.findall(r'^set (\w+) "?([^"\n]*)"?$', Path("project.tcl").read_text(), re.MULTILINE))
    top = settings["project_name"]
    figures = Figures(
        family="Vivado" if name == "vivado_hls" else "Vitis",
        version=version,
        top=top,
        part=settings["part"],
        clock_ns=float(settings["clock_period"]),
        status="Fail" if scenario == "cosim failure" else "Pass",
    )
    if name == "vivado":
        assert arguments == ["-mode", "batch", "-source", "vivado_synth.tcl"], arguments
        if scenario == "licence failure":
            say("Attempting to get a license for feature 'Synthesis' and/or device 'xcvu13p'")
            say("WARNING: [Common 17-348] Failed to get the license for feature 'Synthesis' and/or device 'xcvu13p'")
            say(LICENCE)
            return 1
        Path("vivado_synth.rpt").write_text(utilization_text(figures))
        return 0
    return hls(options(name, arguments), scenario, figures)


def route(arguments: list[str], scenario: str, version: str) -> int:
    """Vivado on the script of a network's Verilog, whose commands must come in Vivado's order."""
    assert arguments == ["-mode", "batch", "-source", "vivado.tcl"], arguments
    script = Path("vivado.tcl").read_text().replace("\\\n", " ")
    commands = [line.split() for line in script.splitlines() if line and not line.startswith("#")]
    clocked = any(command[0] == "read_xdc" for command in commands)
    constrained = (
        ["read_xdc", "synth_design"]
        if clocked
        else ["synth_design", "create_clock", "set_input_delay", "set_output_delay"]
    )
    flow = [
        "opt_design",
        "place_design",
        "phys_opt_design",
        "route_design",
        "report_utilization",
        "report_timing_summary",
    ]
    assert [command[0] for command in commands] == ["read_verilog", *constrained, *flow], commands
    by_name = {command[0]: command for command in commands}
    sources = [word.strip("[]") for word in by_name["read_verilog"][2:]]
    synthesis = dict(zip(by_name["synth_design"][1::2], by_name["synth_design"][2::2], strict=True))
    assert synthesis["-mode"] == "out_of_context"
    assert f"module {synthesis['-top']} " in "".join(Path(source).read_text() for source in sources)
    if clocked:
        period = re.findall(r"(?m)^set clock_period (.+)$", Path(by_name["read_xdc"][-1]).read_text())[0]
    else:
        period = by_name["create_clock"][-1]
    if scenario == "routing failure":
        say("ERROR: [Place 30-640] Place Check : This design requires more Slice LUTs cells than are available")
        return 1
    figures = Figures(version=version, top=synthesis["-top"], part=synthesis["-part"], clock_ns=float(period))
    Path(by_name["report_utilization"][-1]).write_text(utilization_text(figures, "Routed"))
    Path(by_name["report_timing_summary"][-1]).write_text(timing_text(figures, 0.625))
    return 0


def options(name: str, arguments: list[str]) -> dict[str, bool]:
    """As hls4ml's Tcl takes them: from a file that it sources, or from the command line."""
    script = "build_prj.tcl"
    assert Path(script).exists()
    if name == "vivado_hls":
        assert arguments[:2] == ["-f", script], arguments
        return {key: value == "1" for key, value in re.findall(r"(\w+)=+(\w+)", arguments[2])}
    assert arguments == (["--tcl", script, "--mode", "hls"] if name == "vitis-run" else ["-f", script]), arguments
    return {key: value == "1" for key, value in re.findall(r"^ +(\w+) +(\w)$", Path("build_opt.tcl").read_text(), re.M)}


def hls(options: dict[str, bool], scenario: str, figures: Figures) -> int:
    project = Path(f"{figures.top}_prj")
    if options["reset"]:
        shutil.rmtree(project, ignore_errors=True)
    project.mkdir(exist_ok=True)
    (project / ("vivado_hls.app" if figures.family == "Vivado" else "hls.app")).write_text("<project/>\n")
    if options["csim"]:
        begin("C SIMULATION")
        simulate("csim_results.log", wrong=scenario == "csim mismatch")
        end("C SIMULATION")
    if options["synth"]:
        begin("C/RTL SYNTHESIS")
        if scenario == "synthesis failure":
            say("ERROR: [HLS 200-70] Pre-synthesis failed.\ncommand 'ap_source' returned error code")
            return 1
        reports = project / "solution1" / "syn" / "report"
        reports.mkdir(parents=True)
        xml = csynth_xml(figures)
        if scenario == "crash":
            (reports / f"{figures.top}_csynth.xml").write_text(xml[: len(xml) // 2])
            os.kill(os.getpid(), signal.SIGSEGV)
        (reports / f"{figures.top}_csynth.xml").write_text(xml)
        (reports / f"{figures.top}_csynth.rpt").write_text(csynth_text(figures))
        (project / "solution1" / "syn" / "verilog").mkdir()
        end("C/RTL SYNTHESIS")
    if options["cosim"]:
        begin("C/RTL SIMULATION")
        if scenario == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path("child.pid").write_text(str(child.pid))
            say("INFO: [COSIM 212-302] Starting C TB testing ...")
            time.sleep(600)
        report = project / "solution1" / "sim" / "report"
        report.mkdir(parents=True)
        (report / f"{figures.top}_cosim.rpt").write_text(cosim_text(figures))
        if scenario == "cosim failure":
            say("ERROR: [COSIM 212-4] *** C/RTL co-simulation finished: FAIL ***")
        else:
            simulate("rtl_cosim_results.log", wrong=scenario == "cosim mismatch")
            say("INFO: [COSIM 212-1000] *** C/RTL co-simulation finished: PASS ***")
        end("C/RTL SIMULATION")
    if options["vsynth"]:
        begin("VIVADO SYNTHESIS")
        vivado = subprocess.run(["vivado", "-mode", "batch", "-source", "vivado_synth.tcl"])
        if vivado.returncode:
            say("child process exited abnormally")
            return 1
        end("VIVADO SYNTHESIS")
    return 0


def simulate(name: str, *, wrong: bool) -> None:
    """What the test bench writes: the expected outputs, or all of them but the last value."""
    rows = [line.split() for line in Path("tb_data/tb_output_predictions.dat").read_text().splitlines()]
    if wrong:
        rows[-1][-1] = repr(float(rows[-1][-1]) + 1)
    Path("tb_data", name).write_text("".join(" ".join(f"{float(v):.17g}" for v in row) + " \n" for row in rows))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def begin(step: str) -> None:
    say(f"***** {step} *****")


def end(step: str) -> None:
    say(f"***** {step} COMPLETED IN 0h0m0s *****")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
