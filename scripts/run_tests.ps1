<#
.SYNOPSIS
Make .venv with what development needs and run the tests: all but the slow tier, or what the arguments say.
.EXAMPLE
powershell -ExecutionPolicy Bypass -File scripts\run_tests.ps1
.EXAMPLE
.\scripts\run_tests.ps1 -PytestArgs '-m', 'slow'
#>
[CmdletBinding(PositionalBinding = $false)]
param(
    [Parameter(ValueFromRemainingArguments = $true)]
    [string[]]$PytestArgs = @()
)
$ErrorActionPreference = 'Stop'
$root = Split-Path -Parent $PSScriptRoot
& (Join-Path $PSScriptRoot 'setup_env.ps1') -Dev
if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
# One thread each: the workers are the parallelism, and sums come out the same on any number of cores.
if (-not $env:OMP_NUM_THREADS) { $env:OMP_NUM_THREADS = '1' }
# Threads that wait give their core back instead of spinning on it.
if (-not $env:OMP_WAIT_POLICY) { $env:OMP_WAIT_POLICY = 'PASSIVE' }
$words = @('-m', 'pytest')
if ($PytestArgs) { $words += $PytestArgs } else { $words += @('-q', '-n', 'auto', '-m', 'not slow') }
$code = 1
Push-Location -LiteralPath $root
try {
    & (Join-Path $root '.venv\Scripts\python.exe') @words
    $code = $LASTEXITCODE
}
finally {
    Pop-Location
}
exit $code
