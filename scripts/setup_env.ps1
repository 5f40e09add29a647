<#
.SYNOPSIS
Make .venv and install what the suite needs; quick where that is done already.
.DESCRIPTION
The environment variable PYTHON names the Python to use (3.11 to 3.13), TORCH_INDEX a package index for torch.
.EXAMPLE
powershell -ExecutionPolicy Bypass -File scripts\setup_env.ps1 -Dev
#>
[CmdletBinding(PositionalBinding = $false)]
param(
    [switch]$Dev,
    [string]$Extras = ''
)
$ErrorActionPreference = 'Stop'
$root = Split-Path -Parent $PSScriptRoot

function Test-Python {
    param([string]$Command, [string[]]$Words)
    # What a failing probe writes to stderr must not end the script, which 'Stop' would make of it.
    $ErrorActionPreference = 'SilentlyContinue'
    $global:LASTEXITCODE = 1
    $check = 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
    & $Command @Words -c $check 2>&1 | Out-Null
    return ($LASTEXITCODE -eq 0)
}

function Find-Python {
    if ($env:PYTHON) {
        if (Test-Python -Command $env:PYTHON -Words @()) { return @($env:PYTHON) }
        [Console]::Error.WriteLine("error: PYTHON=$env:PYTHON is not a Python 3.11, 3.12 or 3.13 that starts; correct it or unset it")
        exit 2
    }
    # The environment's own Python first: it is there even when the one that made it is not on the PATH.
    $own = Join-Path $root '.venv\Scripts\python.exe'
    if ((Test-Path -LiteralPath $own) -and (Test-Python -Command $own -Words @())) { return @($own) }
    if (Get-Command 'py.exe' -ErrorAction SilentlyContinue) {
        foreach ($version in @('-3.13', '-3.12', '-3.11')) {
            if (Test-Python -Command 'py.exe' -Words @($version)) { return @('py.exe', $version) }
        }
    }
    foreach ($name in @('python.exe', 'python3.exe')) {
        if (Get-Command $name -ErrorAction SilentlyContinue) {
            if (Test-Python -Command $name -Words @()) { return @($name) }
        }
    }
    [Console]::Error.WriteLine('error: no Python 3.11, 3.12 or 3.13 found; install one, or set the environment variable PYTHON to its path')
    exit 2
}

$python = @(Find-Python)
$words = @($python | Select-Object -Skip 1)
$words += @('-I', (Join-Path $root 'scripts\setup_env.py'))
if ($Dev) { $words += '--dev' }
if ($Extras) { $words += @('--extras', $Extras) }
$command = $python[0]
& $command @words
exit $LASTEXITCODE
