<#
.SYNOPSIS
Show the curves of the runs in a folder (default: runs) in a browser.
.DESCRIPTION
-Runs             the folder of the runs
-TensorBoardArgs  options for TensorBoard; they may also stand at the end
.EXAMPLE
powershell -ExecutionPolicy Bypass -File scripts\Start_TensorBoard.ps1
.EXAMPLE
.\scripts\Start_TensorBoard.ps1 D:\my\runs -TensorBoardArgs '--port', '6007'
#>
[CmdletBinding(PositionalBinding = $false)]
param(
    [Parameter(Position = 0)]
    [string]$Runs = '',
    [Parameter(ValueFromRemainingArguments = $true)]
    [string[]]$TensorBoardArgs = @()
)
$ErrorActionPreference = 'Stop'
$root = Split-Path -Parent $PSScriptRoot
if (-not $Runs) { $Runs = Join-Path $root 'runs' }
if (-not (Test-Path -LiteralPath $Runs -PathType Container)) {
    [Console]::Error.WriteLine("error: $Runs is not a folder; train first (scripts\Start_AI_Training.ps1) or name the folder of your runs")
    exit 2
}
& (Join-Path $PSScriptRoot 'setup_env.ps1')
if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
$words = @('-m', 'tensorboard.main', '--logdir', $Runs)
if ($TensorBoardArgs) { $words += $TensorBoardArgs }
& (Join-Path $root '.venv\Scripts\python.exe') @words
exit $LASTEXITCODE
